"""What a row says of heads and channels: every peak is kept, whatever is binned together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kda_conformance.judge import Judgement
from kda_conformance.subject import MOST_CHANNELS, MOST_HEADS, by_channel


def judged(tensor: str, ratio: torch.Tensor) -> Judgement:
    nothing: dict[str, Any] = dict.fromkeys(
        ("score", "z", "slice_z", "gain", "relative_error", "got", "expected", "bound"), 0.0
    )
    return Judgement(tensor=tensor, index={}, ratio=ratio, **nothing)


@pytest.mark.parametrize(
    ("tensor", "shape", "place", "cell"),
    [
        ("o", (2, 7, 3, 5), (1, 6, 2, 4), (2, 4)),
        ("dq", (2, 7, 3, 5), (0, 3, 1, 0), (1, 0)),
        ("dg", (1, 7, 3, 5), (0, 3, 0, 3), (0, 3)),
        ("final_state", (2, 3, 4, 5), (1, 2, 3, 1), (2, 1)),
        ("dinitial_state", (2, 3, 4, 5), (0, 0, 0, 2), (0, 2)),
        ("o", (1, 3, 40, 100), (0, 1, 39, 99), (13, 24)),
    ],
)
def test_a_peak_is_in_the_cell_of_its_head_and_channel(
    tensor: str, shape: tuple[int, ...], place: tuple[int, ...], cell: tuple[int, int]
) -> None:
    ratio = torch.zeros(shape, dtype=torch.float64)
    ratio[place] = 1 / 3
    found = by_channel(judged(tensor, ratio))
    assert found is not None
    peaks = {(i, k): value for i, row in enumerate(found["ratios"]) for k, value in enumerate(row) if value}
    assert peaks == {cell: 0.333}
    assert len(found["ratios"]) <= MOST_HEADS
    assert len(found["ratios"][0]) <= MOST_CHANNELS


def test_what_is_not_finite_stays_so() -> None:
    found = by_channel(judged("o", torch.full((1, 2, 1, 3), torch.inf, dtype=torch.float64)))
    assert found is not None
    assert found["ratios"] == [[math.inf] * 3]


@pytest.mark.parametrize(
    ("tensor", "shape"), [("dbeta", (1, 2, 3)), ("dA_log", (3,)), ("ddt_bias", (12,)), ("o", (1, 0, 2, 4))]
)
def test_a_tensor_without_heads_and_channels_has_no_map(tensor: str, shape: tuple[int, ...]) -> None:
    assert by_channel(judged(tensor, torch.zeros(shape, dtype=torch.float64))) is None
