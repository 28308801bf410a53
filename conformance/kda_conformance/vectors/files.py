"""The format: an index, and for each group a JSON file that describes cases and a safetensors file that holds their tensors.

A tensor's name is ``<case>.<name>``; results have beside them ``<case>.<name>.bound`` and ``<case>.<name>.permitted.<arithmetic>``,
float32 rounded up. JSON is written with sorted keys and one case a line, so that a change shows where it is.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from kda_conformance.claims import DTYPES, UsageError
from kda_conformance.vectors.vector import Vector

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

CHECKSUMS = "SHA256SUMS"
FORMATS = ("bfloat16", "float16", "float32", "float64")


def write_group(folder: Path, group: str, version: str, vectors: Iterable[Vector]) -> int:
    """Write the two files of a group; return the number of cases."""
    tensors: dict[str, Tensor] = {}
    lines = []
    for vector in vectors:
        stored = _tensors(vector)
        tensors |= {f"{vector.id}.{name}": x.clone(memory_format=torch.contiguous_format) for name, x in stored.items()}
        lines.append(json.dumps(_entry(vector), sort_keys=True))
    head = json.dumps({"version": version, "group": group}, sort_keys=True)[:-1]
    (folder / f"{group}.json").write_text(head + ', "cases": [\n' + ",\n".join(lines) + "\n]}\n", encoding="ascii")
    (folder / f"{group}.safetensors").write_bytes(save(tensors))
    return len(lines)


def read_group(folder: Path, group: str) -> list[Vector]:
    """Read the vectors of a group.

    Raises
    ------
    UsageError
        If a file of the group is missing or does not hold what its index says.
    """
    try:
        entries = json.loads((folder / f"{group}.json").read_text(encoding="ascii"))["cases"]
        tensors = load_file(folder / f"{group}.safetensors")
        return [_vector(entry, tensors) for entry in entries]
    except (OSError, KeyError, ValueError) as error:
        message = f"vectors in {folder} must hold the group {group}, got {type(error).__name__}: {error}; run kda vectors build"
        raise UsageError(message) from error


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a set of vectors.

    Raises
    ------
    UsageError
        If there is none.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        message = f"--vectors must be a folder with index.json, got {folder}: {error}; clone the repository or run kda vectors build"
        raise UsageError(message) from error
    return found


def write_checksums(folder: Path) -> None:
    """Write what ``sha256sum --check SHA256SUMS`` verifies."""
    (folder / CHECKSUMS).write_text(
        "".join(f"{digest}  {name}\n" for name, digest in checksums(folder).items()), encoding="ascii"
    )


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a set, by name."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def differing_files(folder: Path) -> list[str]:
    """Return the files whose checksum is not the recorded one, and those that are missing on either side."""
    lines = (folder / CHECKSUMS).read_text(encoding="ascii").splitlines() if (folder / CHECKSUMS).is_file() else []
    recorded = {name: digest for digest, name in (line.split("  ") for line in lines)}
    actual = checksums(folder)
    return sorted(name for name in recorded.keys() | actual.keys() if recorded.get(name) != actual.get(name))


def rounded_up(x: Tensor) -> Tensor:
    """Return float32 numbers that are no smaller."""
    return torch.nextafter(x.float(), torch.tensor(torch.inf))


def exact_in(vector: Vector) -> list[str]:
    """Return the formats that hold every input published as bfloat16 exactly, narrowest first."""
    narrow = [x.double() for x in vector.inputs.values() if x.dtype == torch.bfloat16]
    return [name for name in FORMATS if all(torch.equal(x.to(DTYPES[name]).double(), x) for x in narrow)]


def _tensors(vector: Vector) -> dict[str, Tensor]:
    found = dict(vector.inputs)
    for name, value in vector.value.items():
        found[name] = value
        found[f"{name}.bound"] = rounded_up(vector.bound[name])
        for arithmetic, by_name in vector.permitted.items():
            found[f"{name}.permitted.{arithmetic}"] = rounded_up(by_name[name])
    return found


def _entry(vector: Vector) -> dict[str, Any]:
    return {
        "id": vector.id,
        "comment": vector.comment,
        "flags": vector.flags,
        "dtype": "bfloat16" if any(x.dtype == torch.bfloat16 for x in vector.inputs.values()) else "float32",
        "exact_in": exact_in(vector),
        "options": vector.options,
        "inputs": list(vector.inputs),
        "outputs": list(vector.value),
        "permitted": list(vector.permitted),
        "gain": {
            name: {tensor: float(f"{x:.9g}") for tensor, x in gains.items()} for name, gains in vector.gain.items()
        },
        "recipe": vector.recipe,
    }


def _vector(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Vector:
    name, outputs = entry["id"], entry["outputs"]
    return Vector(
        id=name,
        comment=entry["comment"],
        flags=entry["flags"],
        inputs={key: tensors[f"{name}.{key}"] for key in entry["inputs"]},
        options=entry["options"],
        value={key: tensors[f"{name}.{key}"] for key in outputs},
        bound={key: tensors[f"{name}.{key}.bound"].double() for key in outputs},
        permitted={
            arithmetic: {key: tensors[f"{name}.{key}.permitted.{arithmetic}"].double() for key in outputs}
            for arithmetic in entry["permitted"]
        },
        gain=entry["gain"],
        recipe=entry["recipe"],
    )
