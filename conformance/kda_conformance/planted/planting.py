"""Read the catalogue and turn an entry into a function: the specimen's text, edited and executed."""

from __future__ import annotations

import linecache
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kda_conformance.claims import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = "kda_conformance.planted"
SPECIMEN = "specimen.py"
# Files of the catalogue and of the variants whose entries edit another text.
SPECIMENS = {"decode": "decode_specimen.py"}
PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One replacement in the specimen's text.

    Attributes
    ----------
    old, new
        What is replaced by what; ``old`` occurs ``count`` times in each place.
    where
        Functions to edit; empty means the whole text.
    count
        How often ``old`` must occur.
    """

    old: str
    new: str
    where: tuple[str, ...] = ()
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the catalogue: a bug, or a correct variant.

    Attributes
    ----------
    id
        Its name: that of the public record it is taken from, or one of ours.
    what, trigger, source
        What is wrong, what a call needs to show it, and where it was seen.
    edits
        How the specimen's text changes.
    precision
        Arithmetic class that is claimed.
    equivalent
        Why no suite may catch it; ``None`` for a bug that must be caught.
    part
        The catalogue file it stands in.
    """

    id: str
    what: str
    trigger: str
    source: str
    edits: tuple[Edit, ...]
    precision: str
    equivalent: str | None
    part: str

    def function(self) -> Callable[..., Any]:
        """Return the edited specimen's ``chunk_kda``."""
        text = (files(PACKAGE) / SPECIMENS.get(self.part, SPECIMEN)).read_text(encoding="utf-8")
        for edit in self.edits:
            text = apply(edit, text, self.id)
        name = f"<specimen with {self.id}>"
        # So that a traceback shows the edited lines.
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        module: dict[str, Any] = {"__name__": f"{PACKAGE}.{self.id}"}
        exec(compile(text, name, "exec"), module)  # noqa: S102 - our own text, edited by our own catalogue
        function: Callable[..., Any] = module["chunk_kda"]
        function.precision = self.precision  # type: ignore[attr-defined]
        return function


def apply(edit: Edit, text: str, who: str) -> str:
    """Return the edited text.

    Raises
    ------
    UsageError
        If ``old`` does not occur as often as it must: the catalogue and the specimen have drifted apart.
    """
    for function in edit.where or (None,):
        start, end = (0, len(text)) if function is None else span_of(function, text, who)
        found = text.count(edit.old, start, end)
        if found != edit.count:
            message = f"{who} must find {edit.old!r} {edit.count} times in {function or 'the specimen'}, got {found}; repair the catalogue"
            raise UsageError(message)
        text = text[:start] + text[start:end].replace(edit.old, edit.new) + text[end:]
    return text


def span_of(function: str, text: str, who: str) -> tuple[int, int]:
    """Return where a function's definition starts and ends."""
    match = re.search(rf"^( *)def {function}\(", text, re.MULTILINE)
    if match is None:
        message = f"{who} must edit a function of the specimen, got {function!r}; repair the catalogue"
        raise UsageError(message)
    following = re.compile(rf"^ {{0,{len(match[1])}}}\S", re.MULTILINE).search(text, match.end())
    return match.start(), following.start() if following else len(text)


@cache
def catalogue() -> dict[str, Entry]:
    """Return every bug by id, in the order of the files."""
    return _read("catalogue", "bug")


@cache
def variants() -> dict[str, Entry]:
    """Return every correct variant by id."""
    return _read("variants", "variant")


def _read(folder: str, kind: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file in sorted((files(PACKAGE) / folder).iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".toml"):
            continue
        for table in tomllib.loads(file.read_text(encoding="utf-8"))[kind]:
            entry = _entry(table, file.name.removesuffix(".toml"))
            if entry.id in found:
                message = f"{file.name} must give each entry an id of its own, got {entry.id!r} twice; rename one"
                raise UsageError(message)
            found[entry.id] = entry
    return found


def _entry(table: dict[str, Any], part: str) -> Entry:
    edits = []
    if "old" in table:
        edits.append(
            Edit(
                old=table["old"],
                new=table["new"],
                where=tuple(table.get("where", ())),
                count=table.get("count", 1),
            )
        )
    edits += [Edit(**{**further, "where": tuple(further.get("where", ()))}) for further in table.get("edits", ())]
    if "insert" in table:
        edits.append(Edit(old=table["before"], new=f"{table['insert'].strip()}\n\n\n{table['before']}"))
    return Entry(
        id=table["id"],
        what=table["what"],
        trigger=table.get("trigger", ""),
        source=table.get("source", "own"),
        edits=tuple(edits),
        precision=table.get("precision") or PRECISION[table.get("dtype", "float32")],
        equivalent=table.get("equivalent"),
        part=part,
    )
