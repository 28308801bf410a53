"""The benchmark: judge first, then time all sides in turns, and leave a row for each.

An implementation is timed on a workload only after it passed the judge on a small call with the same flags, and after its result of the
workload itself was found finite. What does not pass leaves a row without a number.
"""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from kda_reference import KdaGradients, KdaResult
from rich.console import Group
from rich.table import Table

from kda_conformance.contenders import Judged
from kda_conformance.rows import SCHEMA, RowWriter, fingerprint, now
from kda_conformance.timing import Spread, calls_in_a_turn, captured, clock_of, measure_ceilings, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from kda_conformance.contenders import Contender
    from kda_conformance.layer_workloads import LayerWorkload
    from kda_conformance.workloads import Workload

    Timed = Workload | LayerWorkload
    Sides = dict[str, list[Callable[[], object]]]
    Row = dict[str, Any]

OUTCOMES = ("measured", "red", "error", "unclaimed")
ROUNDS = {"cuda": 30, "cpu": 10}
TURN_SECONDS = {"cuda": 2e-3, "cpu": 5e-3}
# Input sets together are this many times the last cache before one of them comes again.
CACHES = 3
FEWEST_SETS, MOST_SETS = 2, 128
SEED = 0
WIDEST_NAME = 18


def run(
    sides: Sequence[Contender], workloads: Sequence[Timed], device: str, rounds: int, out: Path, console: Console
) -> list[Row]:
    """Time every side on every workload, write ``out/rows.jsonl``, and return its rows of kind ``bench``.

    Parameters
    ----------
    sides
        What takes turns.
    workloads
        At least one.
    device
        Device type of all sides.
    rounds
        Turns of each side on each workload, at least 2.
    out
        Folder of the results; existing rows are replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").unlink(missing_ok=True)
    writer = RowWriter(out / "rows.jsonl", OUTCOMES)
    ceilings = measure_ceilings(device, rounds)
    console.print(
        f"copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, {ceilings.matmul_dtype} product {ceilings.matmul_flop_per_s / 1e12:.2f} TFLOP/s"
    )
    shared = {
        "kind": "bench",
        "schema": SCHEMA,
        "run": writer.run,
        "started": now(),
        "device": device,
        "rounds": rounds,
        "seed": SEED,
        "ceilings": asdict(ceilings),
        "fingerprint": fingerprint(),
    }
    rows: list[Row] = []
    for workload in workloads:
        found = measure([side for side in sides if side.takes(workload)], workload, device, rounds)
        for row in found:
            writer.counts[row["outcome"]] += 1
            writer.write(shared | row)
        rows += [shared | row for row in found]
        console.print(f"{workload.name}: " + ", ".join(_brief(row) for row in found), highlight=False)
    writer.finish("fail" if failed(rows) else "pass" if writer.counts["measured"] else "nothing")
    return rows


def failed(rows: Sequence[Row]) -> bool:
    """Tell whether a gate is red or something raised."""
    return any(row["outcome"] in ("red", "error") for row in rows)


def measure(sides: Sequence[Contender], workload: Timed, device: str, rounds: int) -> list[Row]:
    """Judge all sides on one workload, time those that pass, and return what is particular to each row."""
    verdicts = {side.name: side.judge(workload) for side in sides}
    timed: dict[str, Row] = {}
    fit = [side for side in sides if verdicts[side.name].outcome == "measured"]
    if fit:
        with torch.set_grad_enabled(workload.backward):
            timed = _time(fit, workload, device, rounds, verdicts)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return [_row(side, workload, verdicts[side.name], timed.get(side.name)) for side in sides]


def num_input_sets(workload: Timed, device: str) -> int:
    """Return how many input sets outgrow the device's last cache ``CACHES`` times."""
    if device == "cpu":
        return FEWEST_SETS
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(FEWEST_SETS, min(MOST_SETS, math.ceil(CACHES * cache / workload.input_bytes)))


def _time(
    sides: Sequence[Contender], workload: Timed, device: str, rounds: int, verdicts: dict[str, Judged]
) -> dict[str, Row]:
    """Return the measured part of the row of each side; a side that fails on the workload itself gets a verdict instead."""
    num_sets = num_input_sets(workload, device)
    inputs = [workload.inputs(SEED + i, device) for i in range(num_sets)]
    cotangents = [workload.cotangents(SEED + i, device) if workload.backward else None for i in range(num_sets)]
    calls: Sides = {}
    peaks: dict[str, int | None] = {}
    for side in sides:
        try:
            prepared = side.prepare_calls(workload, inputs, cotangents)
            result = prepared[0]()
            if side.judged and not _is_finite(result):
                verdicts[side.name] = Judged(
                    outcome="red", message="results of the workload must be finite, got NaN or infinity"
                )
                continue
            del result
            peaks[side.name] = _peak_bytes(prepared[1], workload, device)
            calls[side.name] = [captured(prepared)] if workload.graph else prepared
        except Exception as error:  # noqa: BLE001 - whatever a side raises is its result
            verdicts[side.name] = Judged(outcome="error", message=f"{type(error).__name__}: {error}")
    if not calls:
        return {}
    clock = clock_of(device)
    in_a_turn = 1 if workload.graph else calls_in_a_turn(calls, clock, TURN_SECONDS[device], num_sets)
    spreads = take_turns(calls, rounds, in_a_turn, clock)
    in_a_replay = num_sets if workload.graph else 1
    return {
        name: {
            "time": asdict(Spread.of([sample / in_a_replay for sample in spread.samples])),
            "input_sets": num_sets,
            "calls_in_a_turn": in_a_turn * in_a_replay,
            "peak_bytes": peaks[name],
        }
        for name, spread in spreads.items()
    }


def _is_finite(result: object) -> bool:
    if isinstance(result, torch.Tensor):
        return bool(result.isfinite().all())
    if isinstance(result, (KdaResult, KdaGradients)):
        return all(_is_finite(getattr(result, item.name)) for item in fields(result))
    return not isinstance(result, tuple) or all(_is_finite(part) for part in result)


def _peak_bytes(call: Callable[[], object], workload: Timed, device: str) -> int | None:
    """Return the most memory that one call holds, its own input set counted; ``None`` on a CPU, where nobody counts."""
    if device == "cpu":
        call()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    cotangent_bytes = workload.output_bytes if workload.backward else 0
    return torch.cuda.max_memory_allocated() - before + workload.input_bytes + cotangent_bytes


def _row(side: Contender, workload: Timed, verdict: Judged, timed: Row | None) -> Row:
    seconds = timed["time"]["median"] if timed else None
    return {
        "implementation": side.name,
        "version": side.version,
        "operator": side.operator,
        "judged": side.judged,
        "workload": workload.name,
        "labels": sorted(workload.labels),
        "pass": workload.pass_name,
        "mode": "graph" if workload.graph else "calls",
        **workload.describe(),
        "outcome": verdict.outcome,
        "message": verdict.message,
        "score": verdict.score,
        "least_bytes": workload.least_bytes,
        "flop": workload.flop,
        "bytes_per_s": workload.least_bytes / seconds if seconds else None,
        "flop_per_s": workload.flop / seconds if seconds else None,
        **(timed or {"time": None, "input_sets": 0, "calls_in_a_turn": 0, "peak_bytes": None}),
    }


def _brief(row: Row) -> str:
    if row["time"] is None:
        return f"{row['implementation']} {row['outcome']}"
    return f"{row['implementation']} {1e3 * row['time']['median']:.4g} ms"


def tables(rows: Sequence[Row]) -> Group:
    """Return the rows for the terminal, a table for each workload; ``times`` is relative to the first side that was timed."""
    found: dict[str, Table] = {}
    first: dict[str, float] = {}
    for row in rows:
        name = row["workload"]
        if name not in found:
            found[name] = Table(title=name, title_justify="left", box=None, pad_edge=False)
            found[name].add_column("", min_width=WIDEST_NAME)
            for column in ("ms", "mad", "times", "GB/s", "of copy", "TFLOP/s", "of product", "peak MB"):
                found[name].add_column(column, justify="right")
        if row["time"] is None:
            found[name].add_row(row["implementation"], row["outcome"])
            continue
        time, ceilings = row["time"], row["ceilings"]
        counted = (
            f"{row['bytes_per_s'] / 1e9:.3g}",
            f"{row['bytes_per_s'] / ceilings['copy_bytes_per_s']:.1%}",
            f"{row['flop_per_s'] / 1e12:.3g}",
            f"{row['flop_per_s'] / ceilings['matmul_flop_per_s']:.1%}",
        )
        found[name].add_row(
            row["implementation"],
            f"{1e3 * time['median']:.4g}",
            f"{1e3 * time['mad']:.2g}",
            f"{time['median'] / first.setdefault(name, time['median']):.2f}",
            # What is counted are the bytes and operations of what is judged.
            *(counted if row["judged"] else ("",) * 4),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        )
    return Group(*found.values())
