"""How the work on key channels is cut among programs and launches changes no gradient, and where possible no bit."""

from __future__ import annotations

import kda_optimized.backward
import pytest
import torch
from kda_optimized.launch_config import Table, architecture, table, using
from optimized_calls import DEVICE, OUTPUT_LIMIT, Calls, differentiate, relative_error

CHANNELS = "kda_chunk_bwd_channels_kernel"


def in_slabs(warps: int) -> Table:
    """Return the launch table with slabs of 16 key channels, as many to a program as it has warps."""
    rules = table(architecture(torch.device(DEVICE)))
    return rules | {CHANNELS: [rule | {"block_k": 16, "num_warps": warps} for rule in rules[CHANNELS]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [(2, 2), (1, 2)], ids=["own", "shared"])
def test_gradients_do_not_depend_on_how_many_slabs_a_program_has(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    H, G = heads
    offsets = torch.tensor([0, 1, 1, 90, 150], device=DEVICE)
    inputs = calls.gated(dtype=dtype, T=150, H=H, G=G, K=60, cu_seqlens=offsets)
    do = calls.normal(*inputs.v.shape).to(dtype).to(DEVICE)
    with using(in_slabs(4)):
        _, whole = differentiate(inputs, do, None)
    with using(in_slabs(1)):
        _, parts = differentiate(inputs, do, None)
        # One span at a time, which is what a launch does to a call of any size.
        monkeypatch.setattr(kda_optimized.backward, "SCRATCH_BYTES", 1)
        _, singly = differentiate(inputs, do, None)
    for name, gradient in whole.items():
        assert relative_error(parts[name], gradient) < OUTPUT_LIMIT[dtype], name
        assert torch.equal(singly[name], parts[name]), name
