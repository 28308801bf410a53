"""The repair of the interpreter: bfloat16 words round to nearest even, as torch does."""

from __future__ import annotations

import numpy as np
import torch

from kda_optimized.interpreter import narrow, widen


def test_narrowing_rounds_as_torch_does() -> None:
    values = torch.cat([torch.randn(4000) * 10.0**power for power in (-30, -3, 0, 4, 30)])
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, torch.inf, -torch.inf])
    values = torch.cat([values, ties])
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(narrow(values.numpy()), expected)
    assert np.isnan(widen(narrow(np.array([np.nan], dtype=np.float32)))).all()


def test_widening_undoes_narrowing() -> None:
    words = np.arange(0x7F80, dtype=np.uint16)
    assert np.array_equal(narrow(widen(words)), words)
