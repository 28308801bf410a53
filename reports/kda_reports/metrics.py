"""What is kept of a measurement, by name: its unit, which way is better, and how large a change is worth a person's time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A quantity whose history is kept.

    Attributes
    ----------
    unit
        Of every value.
    page
        The page of the dashboard that shows it: ``speed``, ``memory``, ``accuracy`` or ``compile``.
    better
        ``lower``, ``higher``, or ``neither``: a change is then only said to be one.
    relative, absolute
        A change is relevant when it is at least this fraction of the old value and at least this much, in the unit.
    meaning
        One sentence.
    """

    unit: str
    page: str
    better: str
    relative: float
    absolute: float
    meaning: str


METRICS = {
    "time": Metric(
        unit="s", page="speed", better="lower", relative=0.03, absolute=1e-6, meaning="Median time of one call."
    ),
    "peak-memory": Metric(
        unit="bytes", page="memory", better="lower", relative=0.01, absolute=2.0**20,
        meaning="Most memory during one call, its own inputs counted.",
    ),
    "conformance": Metric(
        unit="pass", page="accuracy", better="higher", relative=0.0, absolute=1.0,
        meaning="1 when every law that was judged holds, 0 otherwise, also for a run that did not end.",
    ),
    "laws-broken": Metric(
        unit="tests", page="accuracy", better="lower", relative=0.0, absolute=1.0, meaning="Tests of laws that failed."
    ),
    "error-over-bound": Metric(
        unit="bound", page="accuracy", better="lower", relative=0.1, absolute=0.02,
        meaning="Largest error of a tensor as a fraction of its bound, over all judged calls; at most 1 passes.",
    ),
    "registers": Metric(
        unit="registers", page="compile", better="lower", relative=0.05, absolute=4.0, meaning="Registers of a thread."
    ),
    "spilled": Metric(
        unit="bytes", page="compile", better="lower", relative=0.0, absolute=1.0,
        meaning="Bytes of memory a thread keeps what found no register in.",
    ),
    "shared-memory": Metric(
        unit="bytes", page="compile", better="lower", relative=0.05, absolute=1024.0,
        meaning="Memory that a program shares among its threads.",
    ),
    "code-size": Metric(
        unit="bytes", page="compile", better="lower", relative=0.05, absolute=512.0, meaning="Machine code of a kernel."
    ),
    "matrix-instructions": Metric(
        unit="instructions", page="compile", better="neither", relative=0.05, absolute=1.0,
        meaning="Matrix (tensor-core) instructions in the code of a kernel; the kinds are in the rows of the compile run.",
    ),
}  # fmt: skip
PAGES = ("speed", "memory", "accuracy", "compile")
