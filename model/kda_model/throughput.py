"""``python -m kda_model.throughput``: tokens per second of training, and the share of each component.

The step is timed whole. Each kind of component is then run alone, forward and backward, on the same number of tokens; its share is
its time times its number over that of the step. What the shares leave over is everything else: norms, residuals, launches.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path  # noqa: TC003 - typer reads annotations when it runs
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import cross_entropy, linear

from kda_model.experts import MixtureOfExperts, SwiGLU
from kda_model.kda_layer import KdaLayer
from kda_model.latent_attention import LatentAttention
from kda_model.model import KimiLinear, initialise
from kda_model.operators import find_operator
from kda_model.presets import preset
from kda_model.training.optimiser import Optimiser

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
HEAD_CHUNK = 2048


def timed(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 2) -> list[float]:
    """Return the milliseconds of each of some repetitions."""
    for _ in range(warm_up):
        work()
    spent = []
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        spent.append(1e3 * (time.perf_counter() - start))
    return spent


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def components(model: KimiLinear, x_BTD: Tensor) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Return the kinds of components: how often each occurs, and its forward pass on the given tokens."""
    operator = find_operator(model.operator, model.device)
    positions = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
    calls: dict[type, tuple[str, Callable[[Any], Tensor]]] = {
        KdaLayer: ("KDA layer", lambda module: module(x_BTD, operator)[0]),
        LatentAttention: ("latent attention", lambda module: module(x_BTD, positions)),
        MixtureOfExperts: ("experts", lambda module: module(x_BTD)),
        SwiGLU: ("dense MLP", lambda module: module(x_BTD)),
    }
    found: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    parts = [part for layer in model.model.layers for part in (layer.self_attn, layer.feed_forward)]
    for kind, (name, call) in calls.items():
        modules = [part for part in parts if type(part) is kind]
        if modules:
            found[name] = (len(modules), partial(call, modules[0]))
    targets = torch.zeros(HEAD_CHUNK, dtype=torch.int64, device=x_BTD.device)
    chunk = x_BTD.flatten(0, 1)[:HEAD_CHUNK]
    number = -(-x_BTD.shape[0] * x_BTD.shape[1] // HEAD_CHUNK)
    found["head and loss"] = (number, lambda: cross_entropy(linear(chunk, model.head).float(), targets[: len(chunk)]))
    return found


def measure(
    model: KimiLinear, optimiser: Optimiser, shape: tuple[int, int], repeats: int, accumulate: int = 1
) -> list[dict[str, Any]]:
    """Return one row of the whole step, of ``accumulate`` batches ``[B, T]``, and one of each component."""
    device = model.device
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator, device=device)
    targets = tokens.roll(-1, 1)

    def step() -> None:
        for _ in range(accumulate):
            (model.loss(tokens, targets, chunk=HEAD_CHUNK) / accumulate).backward()
        optimiser.step(1e-4, 1.0)
        model.balance_routers(1e-3)

    whole = timed(step, device, repeats)
    step_ms = statistics.median(whole)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    rows: list[dict[str, Any]] = [{
        "kind": "throughput", "component": "step", "number": 1, "ms": step_ms, "share": 1.0, "spread_ms": max(whole) - min(whole),
        "tokens_per_second": accumulate * tokens.numel() / step_ms * 1e3, "peak_bytes": peak,
    }]  # fmt: skip
    x_BTD = (
        torch.randn(*shape, model.config.hidden_size, generator=generator, device=device)
        .to(model.dtype)
        .requires_grad_()
    )
    for name, (number, forward) in track(components(model, x_BTD).items(), "components", transient=True):
        # With recomputation the forward pass runs twice.
        again = forward if model.recompute and name != "head and loss" else None
        rows.append(
            _component(name, accumulate * number, timed(partial(_both_ways, forward, again), device, repeats), step_ms)
        )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def update() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimiser.step(0.0, 1.0)

    rows.append(_component("optimiser", 1, timed(update, device, repeats, warm_up=1), step_ms))
    accounted = sum(row["share"] for row in rows[1:])
    rows.append(
        {
            "kind": "throughput",
            "component": "everything else",
            "number": 1,
            "ms": (1 - accounted) * step_ms,
            "share": 1 - accounted,
        }
    )
    return rows


def _both_ways(forward: Callable[[], Tensor], again: Callable[[], Tensor] | None) -> None:
    if again is not None:
        with torch.no_grad():
            again()
    out = forward()
    out.backward(torch.ones_like(out))


def _component(name: str, number: int, spent: list[float], step_ms: float) -> dict[str, Any]:
    ms = number * statistics.median(spent)
    return {"kind": "throughput", "component": name, "number": number, "ms": ms, "share": ms / step_ms}


@app.command()
def throughput(
    out: Annotated[Path, typer.Option(help="file that rows are added to")],
    model: Annotated[str, typer.Option(help="preset")] = "1.1b",
    rows: Annotated[int, typer.Option(help="sequences of a step")] = 2,
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = 4096,
    mixer: Annotated[str, typer.Option(help="kda, gdn, decay, or full for full attention only")] = "kda",
    operator: Annotated[str | None, typer.Option(help="triton, torch, reference or module:callable")] = None,
    optimiser: Annotated[str, typer.Option(help="adamw or muon")] = "muon",
    precision: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    recompute: Annotated[bool, typer.Option(help="compute activations again for the gradient")] = True,  # noqa: FBT002 - an option
    accumulate: Annotated[int, typer.Option(help="batches of a step")] = 1,
    repeats: int = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one")] = "",
) -> None:
    """Measure training: the step, and each component alone."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = preset(model).with_ratio(0) if mixer == "full" else preset(model).replace(mixer=mixer)
    chosen = find_operator(operator, where)
    with where:
        made = KimiLinear(config, chosen).cast(getattr(torch, precision))
    initialise(made, 0).train()
    made.recompute = recompute
    found = measure(made, Optimiser(made, optimiser), (rows, length), repeats, accumulate)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    labels = {
        "model": model, "mixer": mixer, "rows": rows, "length": length, "accumulate": accumulate, "optimiser": optimiser,
        "precision": precision, "recompute": recompute, "device": name, "torch": torch.__version__, "operator": chosen.name,
        "parameters": sum(parameter.numel() for parameter in made.parameters()),
    }  # fmt: skip
    shown = Table(
        title=f"{model}, {mixer}, {accumulate} x {rows} x {length} tokens: {found[0]['tokens_per_second']:.0f} tokens/s"
    )
    for title in ("component", "number", "ms", "share"):
        shown.add_column(title, justify="right")
    for row in found:
        shown.add_row(row["component"], str(row["number"]), f"{row['ms']:.1f}", f"{100 * row['share']:.1f} %")
    Console().print(shown)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**labels, **row}) + "\n" for row in found)


if __name__ == "__main__":
    app()
