"""Hypothesis strategies for cases: nothing an implementation does not claim is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from kda_conformance import battery, regimes
from kda_conformance.cases import Case

if TYPE_CHECKING:
    from kda_conformance.claims import Claims

BOUNDARY_LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 80, 96, 127, 128, 129)
WIDTHS = (1, 2, 7, 8, 16, 17, 24, 32, 33, 48)
# One or two channels make every key nearly every other one, and errors cancel as no few members show; the battery has such calls.
FEWEST_CHANNELS = 7


def lengths(longest: int = 140) -> st.SearchStrategy[int]:
    """Draw a sequence length, often beside a chunk or strip boundary."""
    return st.sampled_from(BOUNDARY_LENGTHS) | st.integers(1, longest)


@st.composite
def cases(draw: st.DrawFn, claims: Claims, dtype: str) -> Case:
    """Draw a call within the claims, whose values are finite in ``dtype``."""
    packed = claims.packed and draw(st.booleans())
    part = lengths(70) | st.just(0) if claims.empty else lengths(70)
    tokens = tuple(draw(st.lists(part, min_size=2, max_size=4))) if packed else (draw(lengths()),)
    heads = draw(st.integers(1, 2))
    group = draw(st.sampled_from((1, 2))) if claims.grouped_values else 1
    widths = st.sampled_from(sorted(claims.head_widths)) if claims.head_widths else st.sampled_from(WIDTHS)
    k_width = draw(widths.filter(lambda k: FEWEST_CHANNELS <= k <= (claims.max_k_width or k)))
    forms = [] if "gate" in claims.only_in_kernel else ["log_decay"]
    if claims.gate_in_kernel:
        forms += ["softplus"] * claims.unbounded_decay + ["bounded"] * claims.bounded_gate
    form = draw(st.sampled_from(forms))
    keys = draw(st.sampled_from([name for name in regimes.KEYS if name != "small" or claims.l2norm_in_kernel]))
    sigmoid = claims.beta_sigmoid_in_kernel and ("beta_sigmoid" in claims.only_in_kernel or draw(st.booleans()))
    gate = draw(st.sampled_from([name for name in regimes.GATES if name != "slow"]))
    # Unbounded growth is a property of the input, not of the kernel: keep reflections short of overflow in float16.
    strengths = draw(st.sampled_from(tuple(regimes.STRENGTHS)))
    case = Case(
        T=tokens,
        B=1 if packed else draw(st.integers(1, 2)),
        H=heads,
        G=heads * group,
        K=k_width,
        V=draw(widths),
        gate=gate,
        gate_form=form,
        gate_dtype=draw(st.sampled_from(("float32", "input", "g", "beta"))) if claims.wide_gate else "input",
        keys=keys,
        values=draw(st.sampled_from(tuple(regimes.VALUES))),
        strengths=strengths,
        beta_max=draw(st.sampled_from((1, 2))) if claims.allow_neg_eigval or not sigmoid else 1,
        l2norm=claims.l2norm_in_kernel
        and ("l2norm" in claims.only_in_kernel or keys in ("small", "zero_rows") or draw(st.booleans())),
        sigmoid=sigmoid,
        state=claims.initial_state and draw(st.booleans()),
        cotangent=draw(st.sampled_from(("both", "o", "state"))),
        v_first=claims.state_v_first and draw(st.booleans()),
        scale=draw(st.sampled_from((0.0, 0.25, 1.0))) if claims.scale else 0.0,
        slope=form == "log_decay" or draw(st.booleans()),
        bias=form == "log_decay" or draw(st.booleans()),
        shallow=form != "log_decay" and draw(st.booleans()),
        safe=form == "log_decay" and claims.bounded_gate and (not claims.unbounded_decay or draw(st.booleans())),
        bound=draw(st.sampled_from((regimes.LOWER_BOUND, -1.0))) if form == "bounded" else regimes.LOWER_BOUND,
        seed=draw(st.integers(0, 2**20)),
    )
    return case if battery.fits(case, dtype) else case.replace(values="normal")
