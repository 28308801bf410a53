"""Every mistake is refused by its own class of error, in a text that names the argument and the next step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from kda_reference import (
    DeviceError,
    DomainError,
    DtypeError,
    FlagError,
    KdaError,
    KdaInputs,
    PackingError,
    ShapeError,
    check_inputs,
    check_values,
)
from reference_cases import VARIANTS, make_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Change = Callable[[KdaInputs], KdaInputs]

GATED = make_inputs(gate_form="softplus")
BOUNDED = make_inputs(gate_form="bounded")
PLAIN = make_inputs(H=2, G=2)
PACKED = make_inputs(lengths=(7, 13))
SINGLE = make_inputs(dtype=torch.float32)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values)


def converted(inputs: KdaInputs, name: str, dtype: torch.dtype) -> KdaInputs:
    return inputs.replace(**{name: inputs.tensors()[name].to(dtype)})


MISTAKES: list[tuple[str, KdaInputs, Change, type[KdaError], str]] = [
    (
        "k_shorter",
        PLAIN,
        lambda x: x.replace(k=x.k[:, 1:]),
        ShapeError,
        "k must agree with q on axis T, got 12 against 13",
    ),
    ("k_narrower", PLAIN, lambda x: x.replace(k=x.k[..., 1:]), ShapeError, "k must agree with q on axis K"),
    ("k_of_other_heads", PLAIN, lambda x: x.replace(k=x.k[:, :, 1:]), ShapeError, "k must agree with q on axis H"),
    (
        "v_of_other_batch",
        PLAIN,
        lambda x: x.replace(v=x.v.repeat(2, 1, 1, 1)),
        ShapeError,
        "v must agree with q on axis B",
    ),
    ("g_of_other_heads", PLAIN, lambda x: x.replace(g=x.g[:, :, 1:]), ShapeError, "g must agree with v on axis G"),
    ("g_wider", PLAIN, lambda x: x.replace(g=x.g.repeat(1, 1, 1, 2)), ShapeError, "g must agree with q on axis K"),
    (
        "beta_with_width",
        PLAIN,
        lambda x: x.replace(beta=x.beta[..., None]),
        ShapeError,
        "beta must have the axes [B, T, G]",
    ),
    ("q_without_batch", PLAIN, lambda x: x.replace(q=x.q[0]), ShapeError, "q must have the axes [B, T, H, K]"),
    (
        "odd_groups",
        make_inputs(H=1, G=3),
        lambda x: x.replace(q=x.q.repeat(1, 1, 2, 1), k=x.k.repeat(1, 1, 2, 1)),
        ShapeError,
        "v must have a multiple of q's 2 heads, got 3",
    ),
    (
        "no_heads",
        PLAIN,
        lambda x: x.replace(q=x.q[:, :, :0], k=x.k[:, :, :0]),
        ShapeError,
        "v must have a multiple of q's 0 heads",
    ),
    ("no_width", PLAIN, lambda x: x.replace(v=x.v[..., :0]), ShapeError, "got K=4 and V=0"),
    (
        "a_log_per_channel",
        GATED,
        lambda x: x.replace(A_log=x.dt_bias),
        ShapeError,
        "A_log must have shape (1,), got (4,)",
    ),
    (
        "bias_per_head",
        GATED,
        lambda x: x.replace(dt_bias=x.A_log),
        ShapeError,
        "dt_bias must have shape (4,), got (1,)",
    ),
    (
        "state_transposed",
        PLAIN,
        lambda x: x.replace(state_v_first=True),
        ShapeError,
        "initial_state must have shape [N, G, V, K] = (1, 2, 3, 4)",
    ),
    (
        "one_state_for_two",
        PACKED,
        lambda x: x.replace(initial_state=x.tensors()["initial_state"][:1]),
        ShapeError,
        "initial_state must have shape [N, G, K, V] = (2, 1, 4, 3)",
    ),
    (
        "integer_g",
        PLAIN,
        lambda x: x.replace(g=x.g.long()),
        DtypeError,
        "g must be a floating-point tensor, got torch.int64",
    ),
    (
        "k_in_other_dtype",
        PLAIN,
        lambda x: x.replace(k=x.k.float()),
        DtypeError,
        "k must have q's dtype torch.float64, got torch.float32",
    ),
    (
        "a_log_low",
        GATED,
        lambda x: converted(x, "A_log", torch.bfloat16),
        DtypeError,
        "A_log must be float32, got torch.bfloat16",
    ),
    (
        "state_low",
        SINGLE,
        lambda x: converted(x, "initial_state", torch.bfloat16),
        DtypeError,
        "initial_state must be float32, got torch.bfloat16",
    ),
    (
        "state_high",
        SINGLE,
        lambda x: converted(x, "initial_state", torch.float64),
        DtypeError,
        "initial_state must be float32, got torch.float64",
    ),
    (
        "offsets_as_floats",
        PACKED,
        lambda x: x.replace(cu_seqlens=offsets(0, 7, 20).float()),
        DtypeError,
        "cu_seqlens must be int32 or int64",
    ),
    ("two_devices", PLAIN, lambda x: x.replace(v=x.v.to("meta")), DeviceError, "v must be on q's device cpu, got meta"),
    ("no_a_log", GATED, lambda x: x.replace(A_log=None), FlagError, "A_log must be given with use_gate_in_kernel"),
    (
        "safe_without_bound",
        GATED,
        lambda x: x.replace(safe_gate=True),
        FlagError,
        "lower_bound must be given with safe_gate",
    ),
    (
        "a_log_without_gate",
        PLAIN,
        lambda x: x.replace(A_log=torch.zeros(2)),
        FlagError,
        "A_log must be None unless use_gate_in_kernel",
    ),
    (
        "bias_without_gate",
        PLAIN,
        lambda x: x.replace(dt_bias=torch.zeros(8)),
        FlagError,
        "dt_bias must be None unless use_gate_in_kernel",
    ),
    (
        "doubled_without_sigmoid",
        PLAIN,
        lambda x: x.replace(allow_neg_eigval=True),
        FlagError,
        "allow_neg_eigval must come with use_beta_sigmoid_in_kernel",
    ),
    (
        "bound_too_low",
        BOUNDED,
        lambda x: x.replace(lower_bound=-5.5),
        DomainError,
        "lower_bound must lie in [-5, 0), got -5.5",
    ),
    (
        "bound_of_zero",
        BOUNDED,
        lambda x: x.replace(lower_bound=0.0),
        DomainError,
        "lower_bound must lie in [-5, 0), got 0.0",
    ),
    (
        "bound_nan",
        BOUNDED,
        lambda x: x.replace(lower_bound=float("nan")),
        DomainError,
        "lower_bound must lie in [-5, 0), got nan",
    ),
    ("scale_infinite", PLAIN, lambda x: x.replace(scale=float("inf")), DomainError, "scale must be finite, got inf"),
    ("no_chunk", PLAIN, lambda x: x.replace(chunk_size=0), DomainError, "chunk_size must be positive, got 0"),
    (
        "offsets_of_two_axes",
        PACKED,
        lambda x: x.replace(cu_seqlens=offsets(0, 20)[None]),
        PackingError,
        "cu_seqlens must have shape [N + 1], got (1, 2)",
    ),
    (
        "packed_batch",
        make_inputs(B=2),
        lambda x: x.replace(cu_seqlens=offsets(0, 13)),
        PackingError,
        "q must have batch size 1 with cu_seqlens, got 2",
    ),
    (
        "offsets_start_late",
        PACKED,
        lambda x: x.replace(cu_seqlens=offsets(1, 7, 20)),
        PackingError,
        "cu_seqlens must start at 0, got 1",
    ),
    (
        "offsets_decrease",
        PACKED,
        lambda x: x.replace(cu_seqlens=offsets(0, 13, 7, 20)),
        PackingError,
        "cu_seqlens must not decrease, got 13 then 7 at n=2",
    ),
    (
        "offsets_stop_early",
        PACKED,
        lambda x: x.replace(cu_seqlens=offsets(0, 7, 19)),
        PackingError,
        "cu_seqlens must end at T=20, got 19",
    ),
]


@pytest.mark.parametrize(
    ("inputs", "change", "error", "text"), [pytest.param(*mistake, id=name) for name, *mistake in MISTAKES]
)
def test_every_mistake_is_refused_by_name(inputs: KdaInputs, change: Change, error: type[KdaError], text: str) -> None:
    check_inputs(inputs)
    with pytest.raises(KdaError) as caught:
        check_inputs(change(inputs))
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_legal_call_is_accepted(name: str) -> None:
    inputs = make_inputs(**VARIANTS[name])
    check_inputs(inputs)
    check_values(inputs)


def test_errors_are_value_errors() -> None:
    assert issubclass(KdaError, ValueError)
    for error in (ShapeError, DtypeError, DeviceError, DomainError, PackingError, FlagError):
        assert issubclass(error, KdaError)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_must_be_finite(name: str, value: float) -> None:
    inputs = make_inputs()
    tensor = inputs.tensors()[name].clone()
    tensor[(0,) * tensor.dim()] = 0
    tensor[(-1,) * tensor.dim()] = value
    last = tuple(size - 1 for size in tensor.shape)
    with pytest.raises(DomainError) as caught:
        check_values(inputs.replace(**{name: tensor}))
    assert str(caught.value).startswith(f"{name} must be finite")
    assert f"got {value} at index {last}" in str(caught.value)


def test_log_decays_must_not_be_positive_but_logits_may() -> None:
    inputs = make_inputs()
    with pytest.raises(DomainError, match=r"g must be finite and <= 0 \(a log decay\), got 0.5"):
        check_values(inputs.replace(g=torch.full_like(inputs.g, 0.5)))
    check_values(inputs.replace(g=torch.zeros_like(inputs.g)))
    gated = make_inputs(gate_form="softplus")
    check_values(gated.replace(g=gated.g.abs()))


def test_segments_are_what_can_be_computed_at_once() -> None:
    assert list(make_inputs(B=3, T=5).segments()) == [(slice(0, 3), slice(0, 3), slice(0, 5))]
    assert list(make_inputs(lengths=(2, 0, 3)).segments()) == [
        (slice(0, 1), slice(0, 1), slice(0, 2)),
        (slice(1, 2), slice(0, 1), slice(2, 2)),
        (slice(2, 3), slice(0, 1), slice(2, 5)),
    ]


def test_keywords_rebuild_the_call() -> None:
    inputs = make_inputs(**VARIANTS["everything"])
    again = KdaInputs(**inputs.keywords())
    assert all(getattr(again, name) is value for name, value in inputs.keywords().items())
    assert set(inputs.tensors()) <= set(inputs.keywords())
