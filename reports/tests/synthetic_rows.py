"""Made-up rows for the tests of the reports: small, deterministic, with every outcome that a run can have.

Run as a script it renews the golden page: ``python reports/tests/synthetic_rows.py``. Read the difference before
committing it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kda_reports.page import render_errors
from kda_reports.rows import read_rows

GOLDEN = Path(__file__).parent / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFERENCE = "test_reference.py::test_outputs"
CAUSALITY = "test_causality.py::test_prefix"
CASE = "T=85 H=2 G=2 K=16 V=24 seed=50"
Row = dict[str, Any]


def run_row(name: str, **changes: Any) -> Row:
    """Return the row that opens a run; its identifier is made from the name."""
    fingerprint = {"python": "3.11.7", "torch": "2.13.0", "gpu": None, "commit": COMMIT, "dirty": False}
    row = {
        "kind": "run",
        "schema": 1,
        "run": f"run-{name}",
        "implementation": name,
        "version": "1.2.3",
        "effort": "quick",
        "started": "2026-01-02T03:04:05+00:00",
        "device": "cpu",
        "claims": {
            "precision": {"bfloat16": "bf16"},
            "devices": ["cpu", "cuda"],
            "backward": True,
            "head_widths": None,
        },
        "fingerprint": fingerprint,
        "seed": 0,
    }
    return row | changes


def verdict_row(name: str, law: str, outcome: str = "pass", **changes: Any) -> Row:
    """Return a verdict; a failure has a message and everything but an unclaimed test a reproduction."""
    row = {
        "kind": "verdict",
        "run": f"run-{name}",
        "implementation": name,
        "law": law,
        "test": f"{REFERENCE}[bfloat16|{CASE}]",
        "case": CASE,
        "dtype": "bfloat16",
        "precision": "bf16",
        "outcome": outcome,
        "score": None,
        "message": f"{name} breaks the law {law}\n  {command(name, law)}" if outcome in ("fail", "xfail") else "",
        "reason": "rounds once more than it claims (issue 7)" if outcome == "xfail" else "",
        "reproduction": "" if outcome == "unclaimed" else command(name, law),
        "seconds": 0.25,
    }
    return row | changes


def measure_row(name: str, law: str, tensor: str, score: float, **changes: Any) -> Row:
    """Return a measurement whose profile peaks with its score at token 17."""
    tokens = [[4 * i, score / (1 + abs(4 * i - 17))] for i in range(20)]
    decays = [[10 ** (i / 2 - 2), score / (1 + abs(i - 6))] for i in range(12)]
    row = {
        "kind": "measure",
        "run": f"run-{name}",
        "implementation": name,
        "law": law,
        "test": f"{REFERENCE}[bfloat16|{CASE}]",
        "case": CASE,
        "dtype": "bfloat16",
        "precision": "bf16",
        "tensor": tensor,
        "score": score,
        "z": 10 * score,
        "slice": score,
        "gain": score,
        "relative_error": score / 300,
        "worst": {"index": {"b": 0, "t": 17, "g": 1, "v": 3}, "got": 1.5 + score, "expected": 1.5, "bound": 1.0},
        "by_token": tokens,
        "by_decay": decays,
        "by_channel": {
            "head_step": 1,
            "channel_step": 4,
            "ratios": [[score / (1 + i + k) for i in range(6)] for k in range(2)],
        },
        "regime": "moderate",
        "shape": {"B": 1, "T": 85, "H": 2, "G": 2, "K": 16, "V": 24, "N": 1},
        "reproduction": command(name, law),
    }
    return row | changes


def finish_row(name: str, rows: list[Row], **changes: Any) -> Row:
    """Return the row that closes a run, with the counts of the given rows."""
    outcomes = [row["outcome"] for row in rows if row["kind"] == "verdict" and row["implementation"] == name]
    counts = {outcome: outcomes.count(outcome) for outcome in ("pass", "fail", "error", "xfail", "unclaimed", "may")}
    failed = counts["fail"] + counts["error"] > 0
    row = {
        "kind": "finish",
        "run": f"run-{name}",
        "implementation": name,
        "exit": "fail" if failed else "pass",
        "counts": counts,
        "seconds": 12.5,
    }
    return row | changes


def closed(name: str, rows: list[Row]) -> list[Row]:
    """Return the rows of a whole run: opened, as given, closed."""
    return [run_row(name), *rows, finish_row(name, rows)]


def command(name: str, law: str) -> str:
    """Return a reproduction."""
    return f'kda reproduce --impl {name} --law {law} --dtype bfloat16 --case "{CASE}"'


def lines(rows: list[Row]) -> str:
    """Return rows as the text of a rows file."""
    return "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)


def plain(value: Any) -> Any:
    """Return a value with non-finite numbers as the strings that stand for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def sample() -> list[Row]:
    """Return runs of five implementations: right, wrong, narrow in its claims, with a known failure, torn."""
    steady = [
        verdict_row("steady", "prefix-causality", test=CAUSALITY),
        verdict_row("steady", "forward-matches-reference", score=0.43),
        measure_row("steady", "forward-matches-reference", "o", 0.43),
        measure_row("steady", "forward-matches-reference", "final_state", 0.2, by_token=[], by_decay=[]),
        measure_row("steady", "gradients-match-reference", "dq", 0.3, by_decay=[]),
        verdict_row("steady", "gradients-match-reference", score=0.3),
    ]
    wrong = [
        verdict_row("wrong", "prefix-causality", "error", test=CAUSALITY, message="RuntimeError: launch failed"),
        verdict_row("wrong", "forward-matches-reference", "fail", score=5394.9),
        verdict_row("wrong", "forward-matches-reference", score=0.9),
        measure_row("wrong", "forward-matches-reference", "o", 5394.9),
        measure_row(
            "wrong", "gradients-match-reference", "dq", math.inf, by_token=[[0, 0.4], [17, math.nan]], by_decay=[]
        ),
        verdict_row("wrong", "gradients-match-reference", "fail", score=math.inf),
    ]
    narrow = [
        verdict_row("narrow", "prefix-causality", "unclaimed", test=CAUSALITY, message="unclaimed: prefix_causal"),
        verdict_row("narrow", "forward-matches-reference", score=0.8),
        measure_row("narrow", "forward-matches-reference", "o", 0.8),
        verdict_row("narrow", "gradients-match-reference", "unclaimed", message="unclaimed: backward"),
    ]
    known = [
        verdict_row("known", "prefix-causality", "xfail", test=CAUSALITY),
        verdict_row("known", "forward-matches-reference", score=0.0),
        measure_row("known", "forward-matches-reference", "o", 0.0),
        verdict_row("known", "gradients-match-reference", "may", score=2.5),
    ]
    torn = [run_row("torn"), verdict_row("torn", "prefix-causality", test=CAUSALITY)]
    runs = {"steady": steady, "wrong": wrong, "narrow": narrow, "known": known}
    return [row for name, rows in runs.items() for row in closed(name, rows)] + torn


def main() -> None:
    """Write the golden rows and the page they give."""
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "rows.jsonl").write_text(lines(sample()), encoding="utf-8")
    page = render_errors(read_rows([GOLDEN / "rows.jsonl"]), ["rows.jsonl"])
    (GOLDEN / "errors.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
