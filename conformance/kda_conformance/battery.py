"""The fixed cases: small calls, each chosen because some bug shows on it and hides elsewhere.

``QUICK`` runs at every effort, ``STANDARD`` from the middle one up,
``LONG`` at the highest; ``WIDE`` is an effort of its own, for a GPU. What a regime exposes is said in ``regimes.py``; lengths sit around
the residues of chunks of 16, 32 and 64, widths include odd ones, and K differs from V wherever a transposition could hide.
"""

from __future__ import annotations

from kda_conformance.cases import Case

EFFORTS = ("quick", "standard", "exhaustive", "wide")
FLOAT16_OVERFLOWS = ("big", "huge", "least")

QUICK = tuple(
    Case.parse(text)
    for text in (
        "T=70 K=32 V=16 seed=1",
        "T=130 H=1 G=2 K=32 V=16 gate=layer gate_form=softplus l2norm=1 sigmoid=1 gate_dtype=input seed=2",
        "T=100 K=16 V=32 gate=uniform gate_form=bounded bound=-3.0 l2norm=1 sigmoid=1 beta_max=2 v_first=1 seed=3",
        "T=37,64,0,1,65 H=1 G=2 K=16 V=24 seed=4",
        "T=129 gate=zero keys=near strengths=near_one seed=5",
        "T=80 gate=tiny keys=near strengths=near_one beta_max=2 seed=6",
        "T=96 K=24 V=16 gate=cliffs seed=7",
        "T=75 K=16 V=20 gate=hundreds state=0 seed=8",
        "T=90 K=20 V=12 gate=spikes values=sparse state=0 seed=9",
        "T=66 K=33 V=16 l2norm=1 keys=small gate=mixed seed=10",
        "T=50 K=16 V=16 l2norm=1 keys=zero_rows seed=11",
        "T=48 K=17 V=33 gate=one_channel cotangent=state scale=0.5 seed=12",
        "B=2 T=33 H=2 G=4 K=16 V=24 gate=holes cotangent=o seed=13",
        "T=1 H=2 G=2 K=16 V=8 seed=14",
        "T=270 K=16 V=16 gate=constant strengths=one keys=positive seed=15",
        "T=64 K=32 V=16 gate=bound values=big seed=16",
        "T=40 K=16 V=16 gate=slow strengths=faint sigmoid=1 state=0 seed=17",
        "B=2 T=40 H=1 G=2 K=16 V=16 gate=uniform gate_form=softplus shallow=1 l2norm=1 sigmoid=1 seed=18",
        "T=33 K=16 V=16 gate=mixed strengths=zero seed=19",
    )
)

STANDARD = tuple(
    Case.parse(text)
    for text in (
        *(f"T={t} K=16 V=24 gate={gate} seed={t}" for t, gate in zip(
            (2, 3, 15, 16, 17, 31, 32, 47, 49, 63, 65, 127, 128),
            (
                "moderate", "uniform", "alternating", "mixed", "holes", "bound", "layer", "zero", "spikes", "cliffs", "uniform", "mixed",
                "moderate",
            ),
            strict=True,
        )),
        "T=0 H=1 G=2 K=16 V=8 seed=20",
        "T=0,0 H=1 G=1 K=16 V=8 seed=21",
        "T=1,1,1,2,64,1,63 H=1 G=1 K=16 V=16 gate=uniform seed=22",
        "T=16,15,17,64,0,33 H=2 G=4 K=16 V=16 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=23",
        "T=150 K=64 V=64 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=24",
        "T=150 K=60 V=100 gate=uniform gate_form=bounded l2norm=1 sigmoid=1 seed=25",
        "T=70 gate=uniform gate_form=bounded slope=0 bias=0 l2norm=1 sigmoid=1 seed=26",
        "T=140 K=128 V=128 seed=27",
        "T=192 gate=zero keys=same strengths=one beta_max=2 values=alternating K=16 V=16 seed=28",
        "T=128 gate=zero keys=same strengths=one K=16 V=16 seed=29",
        "T=130 gate=tiny keys=orthogonal strengths=one K=32 V=16 seed=30",
        "T=130 gate=alternating keys=positive seed=31",
        "T=96 gate=hundreds gate_form=softplus l2norm=1 sigmoid=1 beta_max=2 seed=32",
        "T=300 K=16 V=16 gate=slow strengths=tiny seed=33",
        "T=64 values=tiny seed=34",
        "T=80 strengths=zero gate=mixed seed=35",
        "B=3 T=40 H=1 G=3 K=16 V=16 gate=moderate v_first=1 gate_dtype=input seed=36",
        "T=100 gate=spikes gate_form=softplus keys=near strengths=near_one l2norm=1 seed=37",
        "T=64 H=2 G=2 K=8 V=48 gate=cliffs cotangent=o seed=38",
        "T=257 K=32 V=32 gate=layer seed=39",
        "T=24 K=256 V=16 seed=46",
        "T=24 K=16 V=256 gate=holes seed=47",
        "T=40 H=1 G=2 K=16 V=16 gate=layer gate_form=softplus bias=0 l2norm=1 seed=48",
        "T=40 K=16 V=16 gate=uniform gate_form=bounded slope=0 gate_dtype=g seed=66",
        "T=40 K=16 V=16 gate=uniform gate_form=bounded bias=0 gate_dtype=beta seed=67",
        "T=54 K=16 V=16 gate=mixed keys=positive strengths=one sigmoid=1 beta_max=2 seed=68",
        "B=2 T=30 H=2 G=2 K=16 V=16 gate=layer v_first=1 scale=0.3 seed=69",
        "T=70 K=16 V=16 gate=uniform safe=1 seed=74",
        "T=530 K=8 V=8 gate=mixed seed=75",
        "T=20 K=1 V=5 seed=78",
        "T=33 K=2 V=1 gate=layer gate_form=softplus l2norm=1 seed=79",
        "T=150,7,140 H=1 G=2 K=16 V=16 gate=uniform gate_form=bounded l2norm=1 sigmoid=1 seed=76",
        "B=2 T=130 H=2 G=2 K=16 V=16 gate=mixed seed=77",
        "T=70 K=16 V=16 gate=layer values=huge state=0 seed=44",
        "T=70 K=16 V=16 gate=layer values=least state=0 cotangent=state seed=45",
    )
)  # fmt: skip

LONG = tuple(
    Case.parse(text)
    for text in (
        "T=2048 K=16 V=16 gate=slow strengths=tiny seed=40",
        "T=1024 K=32 V=32 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=41",
        "T=512 K=16 V=16 gate=zero keys=same strengths=one seed=42",
        "T=640 K=32 V=32 gate=uniform values=sparse state=0 seed=43",
    )
)

WIDE = tuple(
    Case.parse(text)
    for text in (
        "T=4096 K=128 V=32 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=80",
        "T=4096 K=64 V=64 gate=uniform gate_form=bounded l2norm=1 sigmoid=1 beta_max=2 seed=81",
        "T=300 H=2 G=4 K=60 V=100 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=82",
        "T=300 K=100 V=60 gate=mixed seed=83",
        "T=260 K=256 V=256 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=84",
        "T=257 K=32 V=256 gate=holes seed=85",
        "T=257 K=256 V=32 gate=cliffs v_first=1 seed=86",
        "T=500,0,1,523 H=1 G=2 K=128 V=64 gate=uniform gate_form=bounded l2norm=1 sigmoid=1 seed=87",
        "T=512 K=128 V=128 gate=zero keys=near strengths=near_one seed=88",
        "T=512 K=128 V=128 gate=tiny keys=near strengths=near_one beta_max=2 seed=89",
        "T=2048 K=128 V=128 gate=slow strengths=tiny seed=90",
        "T=1024 K=128 V=128 gate=hundreds values=sparse seed=91",
    )
)
"""Sizes of real models; hours in an interpreter, minutes on a GPU."""

RELATIONS = tuple(
    Case.parse(text)
    for text in (
        "T=85 H=2 G=2 K=16 V=24 seed=50",
        "T=70 H=1 G=2 K=32 V=16 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=51",
        "T=66 K=16 V=16 gate=spikes keys=near strengths=near_one seed=52",
        "T=40 B=2 K=17 V=20 gate=hundreds seed=53",
        "T=22 H=2 G=2 K=16 V=16 gate=uniform safe=1 seed=49",
    )
)
"""Calls on which the relations between two calls are checked."""

WIDE_RELATIONS = tuple(
    Case.parse(text)
    for text in (
        "T=1100 H=2 G=4 K=64 V=64 gate=layer gate_form=softplus l2norm=1 sigmoid=1 seed=92",
        "T=300 H=1 G=2 K=60 V=100 gate=uniform gate_form=bounded l2norm=1 sigmoid=1 seed=93",
        "T=500 H=2 G=2 K=128 V=128 gate=spikes seed=94",
    )
)
"""The same at the widths of real models: what a compiler makes of a kernel depends on its tiles."""


def cases_at(effort: str) -> tuple[Case, ...]:
    """Return the cases judged against the reference at an effort."""
    return {"quick": QUICK, "standard": QUICK + STANDARD, "exhaustive": QUICK + STANDARD + LONG, "wide": WIDE}[effort]


def relation_cases_at(effort: str) -> tuple[Case, ...]:
    """Return the calls that relations are checked on at an effort."""
    return {"quick": RELATIONS[:2], "wide": RELATIONS[:2] + WIDE_RELATIONS}.get(effort, RELATIONS)


def fits(case: Case, dtype: str) -> bool:
    """Tell whether the case's values are finite in ``dtype``."""
    return dtype != "float16" or case.values not in FLOAT16_OVERFLOWS
