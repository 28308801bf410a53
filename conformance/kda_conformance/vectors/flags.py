"""Flags: why a vector exists. Each says what kind of bug it catches and how that bug shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from kda_conformance.cases import Case


class Flag(NamedTuple):
    """One reason for a vector: the kind of bug it catches, and the effect of that bug on the results."""

    bug: str
    effect: str


FLAGS = {
    "KnownAnswer": Flag(
        "a reader of these files that is wrong", "every case fails; fix the harness before the implementation"
    ),
    "StrongDecay": Flag(
        "exponentials of cumulative decays are formed apart and divided", "overflow: infinities or NaN in whole chunks"
    ),
    "SparseDecay": Flag("a cumulative sum of decays cancels", "tokens after a sharp decay are off by far more than others"),
    "SlowDecay": Flag("a state kept in half precision", "decays below its spacing are lost; the error grows along the sequence"),
    "NoDecay": Flag("decay applied where there is none", "the delta rule without gates is missed by a constant factor a token"),
    "DecayByChannel": Flag("decay taken from another channel, or one per head", "single rows of the state are wrong"),
    "SimilarKeys": Flag(
        "the triangular inverse of a chunk by powers, or without its cross blocks", "large errors that only similar keys show"
    ),
    "OrthogonalKeys": Flag("a wrong sign or index in what is erased", "values written once are read back changed"),
    "SmallKeys": Flag("the constant of the normalisation outside its root, or in a mean", "short rows are scaled wrongly"),
    "ZeroKeys": Flag("a division of zero by zero in the normalisation", "NaN"),
    "NegativeEigenvalue": Flag("beta limited to one, or doubled twice", "reflections become projections, or the state grows"),
    "ZeroBeta": Flag("a write that beta does not switch off", "the state is no longer pure decay"),
    "FaintBeta": Flag("one minus a sigmoid by subtraction, tiny writes lost", "small results and gradients lose all digits"),
    "SparseValues": Flag("values of one token that leak into others", "results where there is nothing to read"),
    "ScaledValues": Flag("an absolute tolerance, or a format of too small a range", "small results vanish, large ones overflow"),
    "RaggedTail": Flag("padding of the last chunk that takes part", "the final state, or the last tokens, are wrong"),
    "OneToken": Flag("a path for single tokens that differs from the long one", "decoding drifts from prefill"),
    "SeveralChunks": Flag("the carried state decayed twice, late or not at all", "everything after the first chunk is wrong"),
    "InitialState": Flag("an initial state that is ignored, transposed or not decayed", "early outputs are wrong"),
    "ValueFirstState": Flag("a state in the other layout", "the state is transposed"),
    "Packed": Flag("states or decays that cross from one sequence into the next", "a sequence depends on its neighbour"),
    "EmptySequence": Flag("offsets that do not move, a state that is not passed through", "later sequences use the wrong state"),
    "GroupedHeads": Flag("value heads that read another query head", "heads are permuted; gradients are not summed over a group"),
    "Batch": Flag("strides of a batch", "all but the first row are wrong"),
    "OddWidths": Flag("tiles that read beyond a width", "the last channels are wrong, or depend on memory around"),
    "Scale": Flag("the factor on queries ignored, applied twice, or applied to the state", "outputs are off by a constant factor"),
    "Normalised": Flag("normalisation over another axis, or its gradient left out", "outputs and the gradients of q and k are off"),
    "SoftplusGate": Flag("bias, slope or sign of the softplus gate", "decay of wrong strength; dA_log and ddt_bias off"),
    "BoundedGate": Flag("the bounded gate made by clamping the softplus gate", "weak decays are wrong, strong ones right"),
    "NoSlope": Flag("a missing A_log read as minus infinity or as slope zero", "no decay, or always the same"),
    "SigmoidBeta": Flag("the strength's sigmoid left out or applied twice", "writes of wrong strength"),
    "StateGradientOnly": Flag("the term of the final state left out of the gradient", "all gradients are zero or too small"),
    "OutputGradientOnly": Flag("a missing cotangent read as garbage", "gradients depend on memory"),
    "ConvolutionTail": Flag("the inputs before a call forgotten, or in the wrong order", "the first tokens of a call are wrong"),
    "ShortCall": Flag("a call shorter than the convolution's taps", "the new tail misses old inputs"),
    "AbsorbedForm": Flag("up-projections absorbed into the wrong side", "decoding disagrees with prefill"),
    "SharedKey": Flag("the key part that all heads share left out, rotated or not scaled", "attention is spread wrongly"),
    "SharpAttention": Flag("a softmax without subtraction of its maximum", "overflow: NaN"),
    "CorrectionBias": Flag("weights that include the bias that only chooses", "the right experts with wrong weights"),
    "ExpertGroups": Flag("groups ranked by their best expert, or not at all", "experts of other groups are chosen"),
    "NotRenormalised": Flag("weights renormalised where they should not be", "weights sum to the factor"),
}  # fmt: skip

_OF_CASE: dict[str, Callable[[Case], bool]] = {
    "StrongDecay": lambda c: c.gate in ("bound", "cliffs", "hundreds", "layer", "uniform"),
    "SparseDecay": lambda c: c.gate in ("spikes", "cliffs", "holes", "alternating"),
    "SlowDecay": lambda c: c.gate in ("slow", "tiny", "constant"),
    "NoDecay": lambda c: c.gate == "zero",
    "DecayByChannel": lambda c: c.gate in ("one_channel", "mixed"),
    "SimilarKeys": lambda c: c.keys in ("near", "same", "positive"),
    "OrthogonalKeys": lambda c: c.keys == "orthogonal",
    "SmallKeys": lambda c: c.keys == "small",
    "ZeroKeys": lambda c: c.keys == "zero_rows",
    "NegativeEigenvalue": lambda c: c.beta_max > 1,
    "ZeroBeta": lambda c: c.strengths == "zero",
    "FaintBeta": lambda c: c.strengths in ("faint", "tiny"),
    "SparseValues": lambda c: c.values == "sparse",
    "ScaledValues": lambda c: c.values in ("big", "tiny", "huge", "least"),
    "RaggedTail": lambda c: not c.packed and c.num_tokens % 16 != 0,
    "OneToken": lambda c: 1 in c.T,
    "SeveralChunks": lambda c: c.num_tokens > 64,  # noqa: PLR2004 - the usual chunk
    "InitialState": lambda c: c.state,
    "ValueFirstState": lambda c: c.v_first,
    "Packed": lambda c: c.packed,
    "EmptySequence": lambda c: 0 in c.T,
    "GroupedHeads": lambda c: c.G != c.H,
    "Batch": lambda c: c.B > 1,
    "OddWidths": lambda c: c.K % 8 != 0 or c.V % 8 != 0,
    "Scale": lambda c: c.scale != 0,
    "Normalised": lambda c: c.l2norm,
    "SoftplusGate": lambda c: c.gate_form == "softplus",
    "BoundedGate": lambda c: c.gate_form == "bounded",
    "NoSlope": lambda c: c.gate_form == "bounded" and not c.slope,
    "SigmoidBeta": lambda c: c.sigmoid,
}


def flags_of(case: Case) -> list[str]:
    """Return the flags that a case of the operator earns by its description."""
    return [name for name, earns in _OF_CASE.items() if earns(case)]
