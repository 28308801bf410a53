"""Models with parameters that hide nothing, and what a model says of a batch, named as the reference names it."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import kda_optimized  # noqa: F401 - chooses Triton's mode, before anything else loads Triton
import pytest
import torch
from model_budget import Truth, establish
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

# Scripts that run when imported are no modules of the package's interface.
SCRIPTS = ("__main__",)
F64 = torch.float64


def package() -> ModuleType:
    """Return ``kda_model`` as it is installed now, all of its modules imported."""
    kda = importlib.import_module("kda_model")
    for module in pkgutil.walk_packages(kda.__path__, "kda_model."):
        if module.name.rpartition(".")[2] not in SCRIPTS:
            importlib.import_module(module.name)
    return kda


def made(kda: Any, config: Any, *, seed: int = 1, dtype: torch.dtype = torch.float32, operator: Any = "torch") -> Any:
    """Return a model in ``eval`` mode whose parameters are all far from where they start: nothing is one, zero or alike."""
    generator = torch.Generator().manual_seed(seed)
    model = kda.initialise(kda.KimiLinear(config, operator), seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            elif "A_log" not in name:
                parameter.mul_(8)
        for router in model.routers():
            router.e_score_correction_bias.normal_(0, 0.1, generator=generator)
    return model.to(dtype)


def random_tokens(*shape: int, vocab: int = 64, seed: int = 3) -> Tensor:
    """Return token ids."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=4)
def truth(preset: str, rows: int = 2, length: int = 24) -> tuple[Truth, Tensor]:
    """Return what the reference says of a preset with the parameters of ``made``, and the tokens."""
    kda = package()
    config, tokens = kda.preset(preset), random_tokens(rows, length)
    tensors = {name: x.clone() for name, x in kda.checkpoint.released_tensors(made(kda, config))}
    return establish(config.to_mapping(), tensors, tokens, pytest.MonkeyPatch()), tokens


def evaluate(kda: Any, model: Any, tokens: Tensor, forced: dict[int, Tensor]) -> dict[str, Tensor]:
    """Return logits, hidden states, loss and the gradient of every parameter, by name."""
    hidden: list[Tensor] = []
    watched = [model.model.embed_tokens, *model.model.layers]
    hooks = [
        module.register_forward_hook(lambda _m, _a, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        for module in watched
    ]
    force(model, forced)
    model.zero_grad()
    logits = model(tokens)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for hook in hooks:
        hook.remove()
    found = {"logits": logits, "loss": loss}
    found |= {f"hidden.{layer}": x for layer, x in enumerate(hidden)}
    for name, parameter in model.named_parameters():
        names = kda.checkpoint.released_names(name, parameter.shape)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parts = gradient if len(names) > 1 else [gradient]
        found |= {f"gradient of {one}": part for one, part in zip(names, parts, strict=True)}
    return found


def force(model: Any, forced: dict[int, Tensor] | None) -> None:
    """Make a model's routers choose given experts, or, with ``None``, choose again."""
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer, "block_sparse_moe"):
            layer.block_sparse_moe.gate.forced = None if forced is None else forced[index]


def close(found: Tensor, expected: Tensor) -> None:
    """Demand equality up to the rounding of float64, in which mistakes are larger by ten orders."""
    assert found.dtype == expected.dtype == torch.float64
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert bool(found.isfinite().all())
    if found.numel():
        error = float((found - expected).detach().abs().max())
        assert error <= 1e-11 * (1 + float(expected.detach().abs().max())), error
