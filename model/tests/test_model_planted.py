"""Every planted bug breaks a law: the package is copied, one piece of its text is changed, and the law that names it must fail.

The list, ``planted_bugs.toml``, follows published bugs of models with linear attention (classes V, K, M, G06 and C10). A law
that sees its bug no more is found out here.
"""

from __future__ import annotations

import shutil
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import kda_model
import pytest
from model_cases import package
from model_laws import LAWS

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(kda_model.__file__).parent


class Bug(NamedTuple):
    """One change of one file, and the law that must see it."""

    file: str
    text: str
    change: str
    law: str


BUGS = {
    name: Bug(**values)
    for name, values in tomllib.loads(
        (Path(__file__).with_name("planted_bugs.toml")).read_text(encoding="utf-8")
    ).items()
}


@contextmanager
def planted(bug: Bug, folder: Path) -> Iterator[Any]:
    """Give the package with one change, in place of the real one, and put that back."""
    shutil.copytree(SOURCE, folder / "kda_model", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "kda_model" / bug.file
    text = path.read_text(encoding="utf-8")
    assert text.count(bug.text) >= 1, f"{bug.file} holds no {bug.text!r} any more; plant the bug where that went"
    path.write_text(text.replace(bug.text, bug.change), encoding="utf-8")
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "kda_model"}
    for name in real:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield package()
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "kda_model"]:
            del sys.modules[name]
        sys.modules.update(real)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_breaks_its_law(name: str, tmp_path: Path) -> None:
    bug, law = BUGS[name], LAWS[BUGS[name].law]
    with planted(bug, tmp_path) as kda:
        assert Path(kda.__file__).is_relative_to(tmp_path)
        with pytest.raises((AssertionError, ValueError, RuntimeError, LookupError)):
            law(kda)


def test_every_law_is_broken_by_a_planted_bug() -> None:
    assert set(LAWS) - {bug.law for bug in BUGS.values()} == set()
