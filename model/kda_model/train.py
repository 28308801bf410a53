"""``python -m kda_model.train``: train a model on a synthetic task or a text; run it again to go on after a kill."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads annotations when it runs
from typing import Annotated, Any

import torch
import typer
from kda_reference.errors import KdaError

from kda_model.training.recipe import Recipe
from kda_model.training.run import Run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    data: Annotated[str, typer.Argument(help="palindrome, recall, stacks, or the path of a text")],
    out: Annotated[Path, typer.Option(help="folder of rows, state and model; taken up if it holds a state")],
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one")] = "",
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = 256,
    rows: Annotated[int, typer.Option(help="sequences of a step")] = 32,
    model: Annotated[str, typer.Option(help="preset")] = "synthetic",
    mixer: Annotated[str | None, typer.Option(help="kda, gdn or decay; by default the preset's")] = None,
    operator: Annotated[str | None, typer.Option(help="triton, torch, reference or module:callable")] = None,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    weight_decay: float = 0.1,
    optimiser: Annotated[str, typer.Option(help="adamw or muon")] = "adamw",
    precision: Annotated[str, typer.Option(help="of the parameters; masters are float32")] = "float32",
    recompute: Annotated[bool, typer.Option(help="compute activations again for the gradient")] = False,  # noqa: FBT002 - an option
    graph: Annotated[bool, typer.Option(help="replay steps from a CUDA graph where they can be recorded")] = False,  # noqa: FBT002 - an option
    seed: int = 0,
    stop_at: Annotated[float | None, typer.Option(help="end at this mean accuracy of 20 steps")] = None,
    save_every: int = 500,
    log_every: int = 10,
    progress: bool = True,  # noqa: FBT001, FBT002 - an option
) -> None:
    """Train a model and write rows of loss and accuracy."""
    settings: dict[str, Any] = {key: value for key, value in locals().items() if key in Recipe.__dataclass_fields__}
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        run = Run(Recipe(**settings), out, where, graph=graph)
        if graph and run.obstacle:
            typer.echo(f"steps are launched one by one, not from a CUDA graph: {run.obstacle}", err=True)
        accuracy = run.train(save_every=save_every, log_every=log_every, progress=progress)
    except KdaError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"step {run.step}: mean accuracy of the last steps {accuracy:.4f}; {out / 'rows.jsonl'}")


if __name__ == "__main__":
    app()
