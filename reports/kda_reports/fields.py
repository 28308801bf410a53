"""Files of rows, read strictly: one JSON object a line, whose fields are taken out with their types checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
Value = TypeVar("Value")


class RowError(ValueError):
    """A rows file does not say what a rows file must; the text names the file and the line."""


def each_row(paths: Iterable[Path], command: str) -> Iterator[Fields]:
    """Yield the rows of files, one after the other.

    Raises
    ------
    RowError
        If a file cannot be read, which names the command that makes one, or a line is no JSON object.
    """
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            message = f"rows file must be readable text, got {error}; run `{command}` to make one"
            raise RowError(message) from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Fields.parse(line, f"{path.name} line {number}")


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object whose fields are taken out with their types checked."""

    fields: Mapping[str, object]
    where: str

    @classmethod
    def parse(cls, line: str, where: str) -> Fields:
        """Read one line; ``where`` names it in errors."""
        try:
            found = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            message = f"{where} must be a JSON object, got {error}; the file may be torn at its end"
            raise RowError(message) from error
        if not isinstance(found, dict):
            message = f"{where} must be a JSON object, got {type(found).__name__}; each line is one row"
            raise RowError(message)
        return cls(found, where)

    def error(self, name: str, rule: str, got: str) -> RowError:
        """Return the error that says which field must follow which rule."""
        return RowError(f"{self.where}: {name} must {rule}, got {got}; write the rows again with a matching suite")

    def get(self, name: str, wanted: type[Value]) -> Value:
        """Return a field of a type."""
        if name not in self.fields:
            raise self.error(name, "be present", f"a row with {', '.join(sorted(self.fields)) or 'no fields'}")
        value = self.fields[name]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise self.error(name, f"be of type {wanted.__name__}", repr(value))
        return value

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        """Return a word out of some."""
        value = self.get(name, str)
        if value not in allowed:
            raise self.error(name, f"be one of {', '.join(allowed)}", repr(value))
        return value

    def number(self, name: str) -> float:
        """Return a number, which may be non-finite."""
        return self._number(name, self.get(name, object))

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, str) and value in NON_FINITE:
            return NON_FINITE[value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, "be a number, nan, inf or -inf", repr(value))
        return float(value)

    def inner(self, name: str) -> Fields:
        """Return the fields of an object inside."""
        return Fields(self.get(name, dict), f"{self.where}, {name}")

    def counts(self, name: str) -> dict[str, int]:
        """Return an object of whole numbers."""
        inner = self.inner(name)
        return {key: inner.get(key, int) for key in inner.fields}

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return a list of numbers."""
        return tuple(self._number(name, value) for value in self.get(name, list))

    def table(self, name: str) -> tuple[tuple[float, ...], ...]:
        """Return a list of lists of numbers, all of one length."""
        found: list[tuple[float, ...]] = []
        for line in self.get(name, list):
            if not isinstance(line, list) or (found and len(line) != len(found[0])):
                raise self.error(name, "hold lists of one length", repr(line))
            found.append(tuple(self._number(name, value) for value in line))
        return tuple(found)

    def pairs(self, name: str) -> tuple[tuple[float, float], ...]:
        """Return a list of pairs of numbers."""
        found = []
        for pair in self.get(name, list):
            if not isinstance(pair, list) or len(pair) != 2:  # noqa: PLR2004 - a pair
                raise self.error(name, "hold pairs", repr(pair))
            found.append((self._number(name, pair[0]), self._number(name, pair[1])))
        return tuple(found)


def _refuse_constant(name: str) -> float:
    message = f"the bare constant {name}; non-finite numbers are written as strings"
    raise ValueError(message)
