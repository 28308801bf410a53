"""Made-up rows of training: two tasks, three mixers, one run that was stopped, and the components of a step."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
# How many steps halve the share of wrong guesses.
HALVING = {"kda": 20, "gdn": 30, "decay": 60}
SETTINGS: Row = {
    "model": "1.1b",
    "mixer": "kda",
    "rows": 2,
    "length": 4096,
    "device": "A GPU",
    "torch": "2.11.0",
    "operator": "triton",
}
SHARES = {"KDA layer": 0.3, "experts": 0.45, "optimiser": 0.27, "everything else": -0.02}


def run_row(mixer: str = "kda", **changes: Any) -> Row:
    """Return the row that opens a run; changes are those of its recipe."""
    recipe = {
        "data": "recall",
        "length": 256,
        "mixer": mixer,
        "seed": 0,
        "steps": 400,
        "learning_rate": 1e-3,
        "stop_at": 0.999,
    }
    return {"kind": "run", "recipe": recipe | changes, "torch": "2.11.0", "device": "A GPU", "operator": "triton"}


def step_row(step: int, mixer: str = "kda", **changes: Any) -> Row:
    """Return one step."""
    wrong = 0.5 ** (step / HALVING.get(mixer, 20))
    row = {
        "kind": "train",
        "step": step,
        "loss": 4 * wrong,
        "accuracy": 1 - wrong,
        "gradient_norm": 1 + (step == 30),
        "tokens": 16384,
        "seconds": 0.1 * step,
        "data": "recall",
        "mixer": mixer,
        "length": 256,
        "seed": 0,
    }
    return row | changes


def run_rows(mixer: str = "kda", steps: tuple[int, ...] = tuple(range(10, 401, 10)), **changes: Any) -> list[Row]:
    """Return a whole run; changes are those of its recipe."""
    labels = {key: value for key, value in changes.items() if key in ("data", "length", "seed")}
    return [run_row(mixer, **changes), *(step_row(step, mixer, **labels) for step in steps)]


def throughput_rows(**changes: Any) -> list[Row]:
    """Return the components of a step."""
    labels = {"kind": "throughput", **SETTINGS, **changes}
    whole = {
        "component": "step",
        "number": 1,
        "ms": 100.0,
        "share": 1.0,
        "spread_ms": 2.0,
        "tokens_per_second": 12345.6,
        "peak_bytes": 10**9,
    }
    parts = [{"component": name, "number": 4, "ms": 100 * share, "share": share} for name, share in SHARES.items()]
    return [{**labels, **row} for row in (whole, *parts)]


def sample() -> list[Row]:
    """Return a run of each mixer on each task, the last of which was stopped, and a throughput."""
    rows = [row for data in ("recall", "stacks") for mixer in HALVING for row in run_rows(mixer, data=data)]
    return [*rows[:-5], *throughput_rows()]
