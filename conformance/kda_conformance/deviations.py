"""Declared deviations: failures an adopter knows of, kept in the adopter's own repository.

A TOML file of ``[[deviation]]`` tables with ``test`` (a test id, or a prefix ending in ``*``), ``reason`` and ``issue``. A declared
failure is an expected failure; once fixed it fails and says so; an entry that matches nothing is a usage error.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from kda_conformance.claims import UsageError

if TYPE_CHECKING:
    from pathlib import Path

REQUIRED = ("test", "reason", "issue")


@dataclass(frozen=True, slots=True)
class Deviation:
    """One declared failure."""

    test: str
    reason: str
    issue: str

    def matches(self, nodeid: str) -> bool:
        """Tell whether the entry names this test; the folder part of a test id is ignored."""
        short = nodeid.rpartition("/")[2]
        if self.test.endswith("*"):
            return short.startswith(self.test[:-1])
        return short == self.test


def read_deviations(path: Path) -> list[Deviation]:
    """Read a deviations file.

    Raises
    ------
    UsageError
        If the file is no TOML, or an entry lacks a field or has an unknown one.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        message = f"deviations file {path} must be readable TOML, got {error}; fix the file or the option"
        raise UsageError(message) from error
    if set(content) - {"deviation"}:
        message = (
            f"deviations file {path} must hold only [[deviation]] tables, got {sorted(content)}; see docs/adopting.md"
        )
        raise UsageError(message)
    found = []
    for number, entry in enumerate(content.get("deviation", []), start=1):
        lacking = [name for name in REQUIRED if not entry.get(name)]
        unknown = sorted(set(entry) - set(REQUIRED))
        if lacking or unknown:
            message = f"deviation {number} of {path} must have {list(REQUIRED)}, got lacking {lacking} and unknown {unknown}; complete it"
            raise UsageError(message)
        found.append(Deviation(**entry))
    return found


def apply(path: Path, items: list[pytest.Item], *, partial: bool) -> None:
    """Mark declared failures as strict expected failures.

    Parameters
    ----------
    partial
        Whether only a part of the suite was collected; an entry without a match is then no sign of staleness.

    Raises
    ------
    UsageError
        If an entry matches no collected test of a whole run.
    """
    for deviation in read_deviations(path):
        matched = [item for item in items if deviation.matches(item.nodeid)]
        if not matched and not partial:
            message = (
                f"deviation {deviation.test!r} of {path} must match a collected test, got none; delete or rename it"
            )
            raise UsageError(message)
        for item in matched:
            item.add_marker(pytest.mark.xfail(reason=f"{deviation.reason} ({deviation.issue})", strict=True))
