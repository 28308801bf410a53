"""Which vectors of the operator there are: small calls, chosen so that each kind of bug shows on several of them.

A group is a list of cases; seeds follow from places in the list, so vectors are added at the end of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kda_conformance.cases import Case
from kda_conformance.regimes import GATES, KEYS, STRENGTHS

if TYPE_CHECKING:
    from collections.abc import Iterable

SMALL = "K=8 V=6"
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65)
IN_KERNEL = "l2norm=1 sigmoid=1"
FORMS, BOTH, SIMILAR = ("softplus", "bounded"), (1, 2), ("near", "same", "orthogonal")


def cases_of(group: str) -> list[Case]:
    """Return the cases of a group, with their seeds."""
    first = 1000 * (1 + list(GROUPS).index(group))
    return [Case.parse(f"{text} seed={first + place}") for place, text in enumerate(GROUPS[group])]


def _forward() -> Iterable[str]:
    yield "T=1 K=1 V=1 gate=constant state=0"
    yield from (f"T={t} {SMALL} gate=moderate state=0" for t in LENGTHS)
    yield from (f"T=20 {SMALL} gate={gate} state=0" for gate in GATES)
    yield from (f"T=24 {SMALL} keys={keys} beta_max={top} state=0" for keys in KEYS for top in BOTH)
    yield from (f"T=18 {SMALL} strengths={strengths} state=0" for strengths in STRENGTHS)
    yield from (
        f"T=22 {SMALL} gate=uniform values={values} state=0"
        for values in ("big", "tiny", "sparse", "huge", "alternating")
    )
    yield from (
        f"T=12 K={k} V={v} gate=mixed state=0" for k, v in ((1, 5), (5, 1), (3, 17), (17, 3), (16, 16), (24, 9))
    )
    yield from (f"T=10 {SMALL} gate=layer scale={scale} state=0" for scale in (1.0, 0.5, -0.25))
    yield from (f"T={t} K=6 V=4 gate={gate} state=0" for t in (70, 97, 130) for gate in ("tiny", "uniform"))
    yield from (f"B=2 T=9 H={h} G={h} K=6 V=4 gate=mixed state=0" for h in (1, 2, 3))


def _state() -> Iterable[str]:
    yield from (f"T={t} {SMALL} gate=mixed" for t in LENGTHS[:9])
    yield from (f"T=14 {SMALL} gate={gate}" for gate in GATES)
    yield from (f"T={t} {SMALL} gate=uniform v_first=1" for t in (1, 5, 16, 33))
    yield from (
        f"T=21 {SMALL} gate=zero keys={keys} strengths=one beta_max={top}"
        for keys in ("near", "same", "orthogonal")
        for top in BOTH
    )
    yield from (f"B=3 T=6 H=2 G=2 K=6 V=4 gate=mixed v_first={first}" for first in (0, 1))
    yield from (f"T=0 {SMALL} v_first={first}" for first in (0, 1))
    yield from (f"T=70 K=6 V=4 gate={gate}" for gate in ("slow", "layer"))


def _gradients() -> Iterable[str]:
    yield from (f"T={t} {SMALL} gate=moderate" for t in LENGTHS[:9])
    yield from (f"T=12 {SMALL} gate={gate}" for gate in GATES)
    yield from (f"T=16 K=6 V=4 keys={keys} beta_max={top}" for keys in KEYS for top in BOTH)
    yield from (f"T=12 {SMALL} gate=mixed cotangent={cotangent}" for cotangent in ("o", "state"))
    yield from (f"T=13 K=6 V=4 gate=uniform cotangent={cotangent} state=0" for cotangent in ("o", "state"))
    yield from (f"T=11 K=6 V=4 gate=mixed {IN_KERNEL} keys={keys}" for keys in ("random", "small", "zero_rows"))
    yield from (
        f"T=11 K=6 V=4 gate=uniform gate_form={form} {IN_KERNEL} beta_max={top}"
        for form in ("softplus", "bounded")
        for top in BOTH
    )
    yield f"T=11 K=6 V=4 gate=uniform gate_form=bounded slope=0 {IN_KERNEL}"
    yield from (f"T=10 H=1 G={g} K=6 V=4 gate=mixed {flags}" for g in (2, 3) for flags in ("", IN_KERNEL))
    yield from (f"T=5,0,1,7 K=6 V=4 gate=mixed v_first={first}" for first in (0, 1))
    yield from (f"T=14 K=6 V=4 gate=layer values={values}" for values in ("big", "tiny", "sparse"))
    yield from (f"T=12 {SMALL} strengths={strengths}" for strengths in STRENGTHS)
    yield from (f"T=70 K=4 V=4 gate={gate}" for gate in ("tiny", "uniform"))


def _decode() -> Iterable[str]:
    yield f"T=6 {SMALL} gate=mixed"
    yield f"T=6 {SMALL} gate=layer gate_form=softplus {IN_KERNEL}"
    yield f"T=6 {SMALL} gate=uniform gate_form=bounded {IN_KERNEL} beta_max=2"
    yield f"T=6 {SMALL} gate=uniform v_first=1"
    yield "T=6 H=2 G=4 K=6 V=4 gate=mixed"
    yield f"B=3 T=6 {SMALL} gate=moderate {IN_KERNEL}"
    yield f"T=6 {SMALL} gate=zero keys=same strengths=one beta_max=2 values=alternating"
    yield f"T=6 {SMALL} gate=cliffs keys=near strengths=near_one"
    yield "T=6 K=16 V=16 gate=slow strengths=tiny"


def _gates() -> Iterable[str]:
    yield from (f"T=10 {SMALL} gate={gate} gate_form=softplus" for gate in GATES)
    yield from (f"T=10 {SMALL} gate={gate} gate_form=bounded" for gate in GATES)
    yield from (f"T=10 {SMALL} gate=uniform gate_form=bounded slope=0 bound={bound}" for bound in (-5.0, -3.0, -0.5))
    yield from (
        f"T=10 {SMALL} gate=moderate gate_form={form} {IN_KERNEL} beta_max={top}"
        for form in ("softplus", "bounded")
        for top in BOTH
    )
    yield from (
        f"T=10 {SMALL} gate=uniform gate_form=softplus shallow=1 {IN_KERNEL} strengths={s}" for s in ("random", "faint")
    )
    yield from (
        f"T=10 {SMALL} sigmoid=1 beta_max={top} strengths={s}" for top in BOTH for s in ("random", "tiny", "near_one")
    )
    yield from (f"T=10 {SMALL} l2norm=1 keys={keys}" for keys in KEYS)
    yield from (f"T=8 H=2 G=4 K=6 V=4 gate=moderate gate_form={form} {IN_KERNEL}" for form in FORMS)


def _varlen() -> Iterable[str]:
    lengths = (
        "3,4",
        "1,1,1",
        "0,5",
        "5,0",
        "0,0,3",
        "16,16",
        "15,17",
        "1,16,2",
        "7,0,1,8",
        "2,3,5,7",
        "33,1",
        "12,0,0,4",
    )
    yield from (f"T={lengths_} {SMALL} gate=mixed" for lengths_ in lengths)
    yield from (f"T={lengths_} {SMALL} gate=layer state=0" for lengths_ in lengths)
    yield from (f"T={lengths_} K=6 V=4 gate=uniform v_first=1" for lengths_ in lengths[:6])
    yield from (
        f"T={lengths_} H=1 G=2 K=6 V=4 gate=moderate gate_form=softplus {IN_KERNEL}" for lengths_ in lengths[:8]
    )
    yield "T=0,0 K=6 V=4"
    yield "T=65,3,64 K=4 V=4 gate=uniform"


def _grouped() -> Iterable[str]:
    heads = ((1, 2), (1, 3), (2, 4), (2, 6), (3, 3), (1, 4))
    yield from (f"T=9 H={h} G={g} K=6 V=4 gate=mixed" for h, g in heads)
    yield from (f"T=9 H={h} G={g} K=6 V=4 gate=layer gate_form=softplus {IN_KERNEL}" for h, g in heads)
    yield from (f"T=9 H={h} G={g} K=6 V=4 gate=uniform gate_form=bounded {IN_KERNEL} beta_max=2" for h, g in heads)
    yield from (f"B=2 T=6 H={h} G={g} K=5 V=7 gate=alternating v_first=1" for h, g in heads)
    yield from (f"T=4,0,3 H={h} G={g} K=6 V=4 gate=moderate" for h, g in heads)


GROUPS: dict[str, list[str]] = {
    "forward": list(_forward()),
    "state": list(_state()),
    "gradients": list(_gradients()),
    "decode": list(_decode()),
    "gates": list(_gates()),
    "varlen": list(_varlen()),
    "grouped": list(_grouped()),
}
"""Texts of cases by group; each case of ``decode`` becomes one vector a token."""
