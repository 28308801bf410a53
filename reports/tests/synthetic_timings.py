"""Made-up rows of a benchmark: two implementations of KDA, two other operators, one refused and one unclaimed timing."""

from __future__ import annotations

from typing import Any

from synthetic_rows import COMMIT

Row = dict[str, Any]
SLOWER = {"quick": 1.0, "steady": 3.0, "fla-dplr": 2.0, "fla-gdn": 0.5}
LENGTHS = tuple(2**i for i in range(11, 17))


def timing_row(name: str, tokens: int = 2048, **changes: Any) -> Row:
    """Return a measured timing, linear in the tokens."""
    median = 1e-7 * SLOWER.get(name, 1.0) * tokens
    row = {
        "kind": "bench",
        "schema": 1,
        "run": "run",
        "started": "2026-01-02T03:04:05+00:00",
        "device": "cuda",
        "rounds": 3,
        "seed": 0,
        "ceilings": {"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 7e14, "matmul_dtype": "bfloat16"},
        "fingerprint": {"torch": "2.13.0", "gpu": "A GPU", "commit": COMMIT, "dirty": False},
        "implementation": name,
        "version": "1.2.3",
        "operator": {"fla-dplr": "DPLR", "fla-gdn": "GDN"}.get(name, "KDA"),
        "judged": not name.startswith("fla"),
        "workload": f"forward-softplus-T{tokens}-H16",
        "labels": ["operators", "tokens"],
        "pass": "forward",
        "mode": "calls",
        "gate": "softplus",
        "dtype": "bfloat16",
        "chunk_size": 64,
        "lengths": [tokens],
        "shape": {"B": 1, "T": tokens, "H": 16, "G": 16, "K": 128, "V": 128, "N": 1},
        "outcome": "measured",
        "message": "",
        "score": 0.5,
        "least_bytes": 20480 * tokens,
        "flop": 2097152 * tokens,
        "bytes_per_s": 20480 * tokens / median,
        "flop_per_s": 2097152 * tokens / median,
        "time": {
            "median": median,
            "mad": 0.01 * median,
            "q1": 0.98 * median,
            "q3": 1.03 * median,
            "least": 0.97 * median,
            "samples": [0.97 * median, median, 1.05 * median],
        },
        "input_sets": 2,
        "calls_in_a_turn": 1,
        "peak_bytes": 3 * 20480 * tokens,
    }
    return row | changes


def refused_row(name: str, outcome: str = "red", **changes: Any) -> Row:
    """Return a timing without a number."""
    empty = {"time": None, "peak_bytes": None, "bytes_per_s": None, "flop_per_s": None, "input_sets": 0}
    return timing_row(name) | empty | {"outcome": outcome, "message": f"{name} is <{outcome}>"} | changes


def finish_row(outcome: str = "pass") -> Row:
    """Return the closing row."""
    counts = {"measured": 1, "red": 0, "error": 0, "unclaimed": 0}
    return {"kind": "finish", "run": "run", "implementation": "", "exit": outcome, "counts": counts, "seconds": 1.0}


def sample() -> list[Row]:
    """Return a whole run."""
    rows = [timing_row(name, tokens) for tokens in LENGTHS for name in SLOWER]
    return [*rows, refused_row("wrong"), refused_row("narrow", "unclaimed"), finish_row("fail")]
