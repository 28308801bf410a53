"""The words of the reports, each explained once."""

from __future__ import annotations

GLOSSARY = {
    "law": "A statement that holds for every correct implementation, tested on many calls.",
    "claim": "What an implementation promises: input dtypes, arguments, widths. Laws are judged only where claimed.",
    "arithmetic class": "How an implementation says it computes for an input dtype: fp64, fp32, tf32, bf16 or fp16. "
    "Rounding that is right for one class is a bug in another.",
    "truth": "The float64 recurrence on exactly the inputs of the call, with a certified bound on its own error.",
    "bound": "The largest error an element may have: ten standard deviations of an ensemble of correct computations "
    "in the claimed class on the same inputs, plus half a unit in the last place of the tensor's dtype.",
    "error over bound": "In the plots and in the worst element: the error less that half unit, over the ten "
    "deviations. At most 1 is within the bound.",
    "score": "What a verdict rests on: the largest of three fractions, of the worst element (limit 10 deviations), of "
    "the worst row, column or head (root mean square, limit 6) and of a common factor (limit 8). At most 1 passes.",
    "pass without a number": "The law has no bound: it asks for equal bits, or for an error to be raised.",
    "not claimed": "The call needs something the implementation does not promise. It is never counted as a pass.",
    "declared failure": "A failure that the run's deviations file names, with a reason and an issue.",
    "recorded only": "A law that may be broken; the outcome is kept and decides nothing.",
    "incomplete": "The run has no proper end, or rows of it are missing. Nothing is concluded from it.",
    "accumulated decay": "Minus the sum of log decays since the sequence began, averaged over channels, in nats.",
    "envelope": "The largest value over all calls, position by position. It is a maximum, never an average.",
}

# The words of the dashboard; ``docs/history.md`` says how each is decided.
TREND_GLOSSARY = {
    "series": "What was measured alike on one machine: the same call, metric, seed and device, commit after commit.",
    "significant": "Stands out of the noise of its own series.",
    "relevant": "Large enough, relative and absolute, to be worth a person's time.",
    "worse, better": "A change since then that is both significant and relevant.",
    "mixed": "Some series are worse and some better.",
    "not comparable": "Not measured on this machine both then and now, or too few values to tell noise from change.",
    "unconfirmed": "A step of which fewer than five commits are seen.",
    "drift": "A straight line explains the series better than steps do, so no commit is to blame.",
}
