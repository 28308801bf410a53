"""Build the published set: every file of it, from the catalogue alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from kda_conformance.judge import GAIN_LIMIT, SLICE_LIMIT, Z_LIMIT
from kda_conformance.vectors.catalogue import GROUPS
from kda_conformance.vectors.files import FORMATS, write_checksums, write_group
from kda_conformance.vectors.flags import FLAGS
from kda_conformance.vectors.parts import PARTS, vectors_of_part
from kda_conformance.vectors.schema import group_schema, index_schema
from kda_conformance.vectors.vector import CLASS_NAMES, vectors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

VERSION = "1.0.1"
ALL_GROUPS = (*GROUPS, *PARTS)


def build(folder: Path, groups: Sequence[str] = ALL_GROUPS, tell: Callable[[str], None] = print) -> None:
    """Write vectors, index, schemas and checksums.

    Parameters
    ----------
    folder
        Where to; made if it is not there.
    groups
        Names of the groups to build.
    tell
        Called with one line a group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # Sums are split among threads, so their number would change the last bits.
    torch.set_num_threads(1)
    try:
        listed = []
        for group in groups:
            made = vectors_of(group) if group in GROUPS else vectors_of_part(group)
            number = write_group(folder, group, VERSION, made)
            kind = "kda" if group in GROUPS else group
            listed.append(
                {"name": group, "kind": kind, "cases": number, "index": f"{group}.json", "data": f"{group}.safetensors"}
            )
            tell(f"{group}: {number} cases")
    finally:
        torch.set_num_threads(threads)
    _write(folder / "index.json", index(listed))
    _write(folder / "index.schema.json", index_schema(sorted(FLAGS), CLASS_NAMES))
    _write(folder / "group.schema.json", group_schema(sorted(FLAGS), CLASS_NAMES, FORMATS))
    write_checksums(folder)


def index(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the contents of ``index.json``."""
    return {
        "version": VERSION,
        "limits": {"element": Z_LIMIT, "slice": SLICE_LIMIT, "gain": GAIN_LIMIT},
        "arithmetic_classes": list(CLASS_NAMES),
        "flags": {name: flag._asdict() for name, flag in FLAGS.items()},
        "groups": groups,
    }


def _write(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n", encoding="ascii")
