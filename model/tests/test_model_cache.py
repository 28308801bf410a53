"""Whatever is done to caches in whatever order, every sequence goes on as its own text says."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from kda_model import Cache, Packing, preset
from model_cases import F64, close, made, package

MODEL = made(package(), preset("tiny"), dtype=F64)
TOKEN = st.integers(0, 63)


@dataclass
class Story:
    """A cache, the texts that it should remember, and those at each mark."""

    cache: Cache
    texts: list[list[int]]
    marks: list[tuple[Any, list[list[int]]]] = field(default_factory=list)

    @torch.no_grad()
    def add(self, parts: list[list[int]]) -> None:
        """Add tokens, one a sequence as a decoding step where all have one, else packed; compare with the whole texts."""
        if all(len(part) == 1 for part in parts):
            found = list(MODEL(torch.tensor(parts), cache=self.cache))
        else:
            packing = Packing(tuple(map(len, parts)), torch.device("cpu"))
            row = torch.tensor([[token for part in parts for token in part]], dtype=torch.int64)
            logits = MODEL(row, packing, self.cache)[0]
            found = [logits[tokens] for tokens in packing.slices()]
        self.texts = [text + part for text, part in zip(self.texts, parts, strict=True)]
        assert self.cache.lengths == [len(text) for text in self.texts]
        for text, part, own in zip(self.texts, parts, found, strict=True):
            if part:
                close(own, MODEL(torch.tensor([text]))[0, -len(part) :])


class Caches(RuleBasedStateMachine):
    """Several caches that share pages; a rule acts on one of them."""

    stories: list[Story]

    @initialize(page_len=st.sampled_from([1, 3, 4]))
    def begin(self, page_len: int) -> None:
        self.stories = [Story(MODEL.new_cache(2, page_len=page_len), [[], []])]

    def pick(self, data: st.DataObject) -> Story:
        return self.stories[data.draw(st.integers(0, len(self.stories) - 1), label="cache")]

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        story = self.pick(data)
        story.add([[data.draw(TOKEN)] for _ in story.texts])

    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        story = self.pick(data)
        story.add([data.draw(st.lists(TOKEN, max_size=6)) for _ in story.texts])

    @precondition(lambda self: len(self.stories) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        story = self.pick(data)
        rows = data.draw(st.lists(st.integers(0, len(story.texts) - 1), min_size=1, max_size=3), label="rows")
        self.stories.append(Story(story.cache.fork(rows), [story.texts[row] for row in rows]))

    @rule(data=st.data())
    def mark(self, data: st.DataObject) -> None:
        story = self.pick(data)
        story.marks.append((story.cache.mark(), story.texts))

    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        story = self.pick(data)
        if story.marks:
            index = data.draw(st.integers(0, len(story.marks) - 1), label="mark")
            del story.marks[index + 1 :]
            mark, story.texts = story.marks[index]
            story.cache.trim(mark)

    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        story = self.pick(data)
        with tempfile.TemporaryDirectory() as folder:
            story.cache.save(Path(folder) / "cache")
            story.cache, story.marks = Cache.load(Path(folder) / "cache", MODEL.config), []

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        story = self.pick(data)
        story.cache.reset()
        story.texts, story.marks = [[] for _ in story.texts], []

    @precondition(lambda self: len(self.stories) > 1)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.stories.remove(self.pick(data))

    def teardown(self) -> None:
        """Decode twice more everywhere, by turns and differently; every page has as many users as tables that list it."""
        stories = getattr(self, "stories", [])
        for turn in range(2):
            for number, story in enumerate(stories):
                story.add([[2 * number + turn]] * len(story.texts))
        for story in stories:
            pages = story.cache.pages
            tables = [table for other in self.stories if other.cache.pages is pages for table in other.cache.tables]
            listed = [page for table in tables for page in table]
            assert pages.users == [listed.count(page) for page in range(len(pages.users))]


TestCaches = Caches.TestCase
TestCaches.settings = settings(max_examples=30, stateful_step_count=10, deadline=None, derandomize=True)
