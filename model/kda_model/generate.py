"""Generation: prompts of any lengths side by side, prefilled in chunks without padding, then one token at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from kda_reference.errors import DomainError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import linear

from kda_model.decode_graph import DecodeGraph
from kda_model.packing import Packing, pack
from kda_model.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from kda_model.cache import Cache
    from kda_model.model import KimiLinear

PREFILL_CHUNK = 4096
GREEDY = Sampling()


@torch.no_grad()
def generate(
    model: KimiLinear,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    cache: Cache | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    on_token: Callable[[int, int], None] | None = None,
    graph: bool = False,
    progress: bool = False,
) -> list[list[int]]:
    """Continue prompts.

    Parameters
    ----------
    model
        In the state it is to be used in; switch to ``eval()`` first.
    prompts
        Token ids of each sequence, at least one.
    max_new_tokens
        Most tokens that are added to each.
    sampling
        How tokens are drawn; greedy unless given.
    stop
        Tokens that end a sequence; the one that does is kept.
    cache
        What each prompt continues; the prompts are added to it, and what is generated is not. ``None`` means beginnings.
    prefill_chunk
        Most tokens of one sequence that are prefilled at once.
    on_token
        Called with the number of the sequence and the token, as soon as it is drawn.
    graph
        Whether steps are replayed from one CUDA graph; sequences that have ended are then decoded on, unheard.
    progress
        Whether a progress bar is shown.

    Returns
    -------
    list[list[int]]
        The tokens added to each prompt.

    Raises
    ------
    DomainError
        If a prompt is empty, or a number is out of range.
    DeviceError
        If a graph is asked for and the model is not on a CUDA device.
    """
    for row, prompt in enumerate(prompts):
        if not prompt:
            message = f"prompts must have at least one token each, got none at n={row}; begin with bos"
            raise DomainError(message)
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("prefill_chunk", prefill_chunk),
        ("prompts", len(prompts)),
    ):
        if value < 1:
            message = f"{name} must be at least 1, got {value}; nothing would be generated"
            raise DomainError(message)
    cache = model.new_cache(len(prompts)) if cache is None else cache
    sampler, made = Sampler(sampling, len(prompts)), [list[int]() for _ in prompts]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns) if progress else None
    with bar or nullcontext():
        advance = _task(bar, "prefill", max(map(len, prompts)))
        logits = prefill(model, prompts, cache, prefill_chunk, advance)
        advance = _task(bar, "generate", max_new_tokens)
        decoder = _Decoder(model, cache.fork(), max_new_tokens if graph else None)
        live = list(range(len(prompts)))
        while True:
            for row, token in zip(live, sampler.draw(logits, live), strict=True):
                made[row].append(token)
                if on_token is not None:
                    on_token(row, token)
            advance(1)
            live = [row for row in live if made[row][-1] not in stop and len(made[row]) < max_new_tokens]
            if not live:
                return made
            logits = decoder.step([new[-1] for new in made], live)


class _Decoder:
    """Adds a token to each sequence that goes on; on a graph to all, since its shape is fixed."""

    def __init__(self, model: KimiLinear, cache: Cache, graph_steps: int | None) -> None:
        self.model, self.cache = model, cache
        self.rows = list(range(cache.num_sequences))
        self.graph = None if graph_steps is None else DecodeGraph(model, cache, graph_steps)

    def step(self, tokens: list[int], live: list[int]) -> Tensor:
        """Return the logits of the live rows; ``tokens`` holds the last one of every row."""
        if self.graph is not None:
            return self.graph.step(torch.tensor(tokens, device=self.model.device))[live]
        if len(live) < len(self.rows):
            self.cache = self.cache.fork([self.rows.index(row) for row in live])
            self.rows = live
        last = torch.tensor([[tokens[row]] for row in live], device=self.model.device)
        logits: Tensor = self.model(last, cache=self.cache)
        return logits[:, 0]


@torch.no_grad()
def prefill(
    model: KimiLinear,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    chunk: int = PREFILL_CHUNK,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Add prompts to a cache, ``chunk`` tokens of each at a time, and return the logits ``[N, vocabulary]`` behind each."""
    last = torch.zeros(len(prompts), model.config.hidden_size, dtype=model.dtype, device=model.device)
    for start in range(0, max(map(len, prompts)), chunk):
        parts = [prompt[start : start + chunk] for prompt in prompts]
        tokens, packing = pack(parts, model.device)
        hidden = model.hidden(tokens, packing, cache)[0]
        ending = [
            n
            for n, (prompt, part) in enumerate(zip(prompts, parts, strict=True))
            if part and start + chunk >= len(prompt)
        ]
        last[ending] = hidden[_ends(packing, ending)]
        advance(max(map(len, parts)))
    return linear(last, model.head)


def _ends(packing: Packing, rows: Sequence[int]) -> list[int]:
    return [packing.offsets[row + 1] - 1 for row in rows]


def _task(bar: Progress | None, name: str, total: int) -> Callable[[int], None]:
    if bar is None:
        return lambda _: None
    task = bar.add_task(name, total=total)
    return lambda number: bar.advance(task, number)
