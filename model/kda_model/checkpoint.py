"""Checkpoints in the released names: safetensors, in one file or in shards with an index, beside ``config.json``.

Every tensor of a checkpoint is used exactly once and every parameter is filled, or loading fails with a list of what is
missing, unexpected or of another shape. Files are mapped into memory and a model is made without memory of its own (on the
``meta`` device), so that loading needs the bytes of the model once. What ``transformers`` writes is read, and the other way round.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from kda_reference.errors import KdaError
from safetensors import safe_open
from safetensors.torch import save_file

from kda_model.config import KimiLinearConfig
from kda_model.model import KimiLinear

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from kda_model.operators import OperatorLike

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
STACKED = re.compile(r"(.*\.experts)\.(w[123])$")
# transformers 5.23 saves the MLP of a dense layer under the name of the experts, which no released checkpoint does.
MISNAMED = re.compile(r"(model\.layers\.\d+\.)block_sparse_moe(\.(?:gate|up|down)_proj\.weight)")
LISTED = 5


class Place(NamedTuple):
    """Where a tensor is stored, and under which name."""

    path: Path
    name: str


class CheckpointError(KdaError):
    """A checkpoint does not hold exactly the tensors of its configuration."""


def released_names(name: str, shape: torch.Size) -> list[str]:
    """Return the names under which a parameter is stored: one, or one for each expert of a stacked matrix."""
    stacked = STACKED.fullmatch(name)
    if stacked is None:
        return [name]
    return [f"{stacked[1]}.{expert}.{stacked[2]}.weight" for expert in range(shape[0])]


def released_tensors(model: KimiLinear) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a model under their released names; those of experts are views of the stacked matrices."""
    for name, tensor in model.state_dict().items():
        names = released_names(name, tensor.shape)
        yield from zip(names, tensor if STACKED.fullmatch(name) else [tensor], strict=True)


def save(model: KimiLinear, folder: Path | str, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a checkpoint: the configuration, and as many shards as ``max_shard_bytes`` asks for."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in released_tensors(model):
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        save_file(
            {name: tensor.contiguous() for name, tensor in shard.items()}, folder / file, metadata={"format": "pt"}
        )
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    dtype = str(model.dtype).removeprefix("torch.")
    _write(folder / "config.json", {**model.config.to_mapping(), "torch_dtype": dtype})


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load(
    folder: Path | str,
    *,
    operator: OperatorLike = None,
    device: torch.device | str = "cpu",
    config: KimiLinearConfig | None = None,
) -> KimiLinear:
    """Read a checkpoint into a model, in the dtypes that it is stored in.

    Parameters
    ----------
    folder
        With ``config.json`` and safetensors files.
    operator
        As in :class:`kda_model.KimiLinear`.
    device
        Where the parameters go.
    config
        ``None`` means that of the folder.

    Raises
    ------
    CheckpointError
        If the tensors are not exactly those of the configuration; lists which.
    """
    folder = Path(folder)
    config = KimiLinearConfig.read(folder) if config is None else config
    with torch.device("meta"):
        model = KimiLinear(config, operator)
    wanted: dict[str, Tensor] = dict(model.state_dict())
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt", device=str(device))) for path in _files(folder)
        }
        places = _places(files)
        _account(wanted, places, files)
        state = {}
        for name, tensor in wanted.items():
            stored = [places[part] for part in released_names(name, tensor.shape)]
            parts = [files[place.path].get_tensor(place.name) for place in stored]
            state[name] = _stack(name, parts) if STACKED.fullmatch(name) else parts[0]
    model.load_state_dict(state, assign=True)
    for router in model.routers():
        router.load = torch.zeros(config.num_experts, dtype=torch.int64, device=device)
    return model


def _stack(name: str, parts: list[Tensor]) -> Tensor:
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        message = f"{name} must have one dtype for all experts, got {sorted(map(str, dtypes))}; convert the checkpoint"
        raise CheckpointError(message)
    stacked = torch.empty(len(parts), *parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
    for target, part in zip(stacked, parts, strict=True):
        target.copy_(part)
    return stacked


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        paths = sorted({folder / file for file in weight_map.values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.exists()]
    if missing or not paths:
        message = (
            f"folder must hold the safetensors files of a checkpoint, got none of {missing or [SINGLE]}; complete it"
        )
        raise CheckpointError(message)
    return paths


def _places(files: Mapping[Path, Any]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for path, file in files.items():
        for stored in file.keys():  # noqa: SIM118 - no mapping
            name = MISNAMED.sub(r"\1mlp\2", stored)
            if name in places:
                message = (
                    f"checkpoint must hold {name} once, got it in {places[name].path.name} and {path.name}; remove one"
                )
                raise CheckpointError(message)
            places[name] = Place(path, stored)
    return places


def _account(wanted: Mapping[str, Tensor], places: Mapping[str, Place], files: Mapping[Path, Any]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the wanted ones."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in wanted.items():
        shape = tensor.shape[1:] if STACKED.fullmatch(name) else tensor.shape
        shapes |= dict.fromkeys(released_names(name, tensor.shape), tuple(shape))
    found = {name: tuple(files[place.path].get_slice(place.name).get_shape()) for name, place in places.items()}
    problems = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unexpected": sorted(found.keys() - shapes.keys()),
        "of another shape": [
            f"{name} {found[name]} for {shapes[name]}"
            for name in sorted(shapes.keys() & found.keys())
            if shapes[name] != found[name]
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:LISTED])}{' ...' if len(names) > LISTED else ''}"
            for what, names in problems.items()
            if names
        )
        message = f"checkpoint must hold exactly the tensors of its configuration, got {listed}; check config.json against the files"
        raise CheckpointError(message)
