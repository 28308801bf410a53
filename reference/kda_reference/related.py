"""Recurrences related to the gated delta rule, each by its own equation and one sequence at a time.

    decay only          S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T
    DeltaNet            S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    Gated DeltaNet      S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    DPLR                S_t = (Diag(exp g_t) - a_t b_t^T) S_{t-1} + k_t v_t^T

with ``o_t = scale S_t^T q_t`` and a log decay ``g_t`` of one value per token, in the last of one per channel. Kimi Delta
Attention with a gate that is the same in every channel is Gated DeltaNet, with no gate DeltaNet, and always DPLR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def decay_only(
    q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, log_decay_T: Tensor, beta_T: Tensor, scale: float, state_KV: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs ``[T, V]`` and the final state of linear attention with a scalar decay.

    Parameters
    ----------
    q_TK, k_TK, v_TV
        One head of one sequence.
    log_decay_T
        Natural log of the decay per token, in ``(-inf, 0]`` (nats).
    beta_T
        Write strength, dimensionless.
    scale
        Factor on the queries (dimensionless).
    state_KV
        State before the first token.
    """
    outputs = []
    for q, k, v, decay, beta in zip(q_TK, k_TK, v_TV, log_decay_T.exp(), beta_T, strict=True):
        state_KV = decay * state_KV + beta * torch.outer(k, v)
        outputs.append(scale * (q @ state_KV))
    return _stacked(outputs, v_TV), state_KV


def delta_net(
    q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, beta_T: Tensor, scale: float, state_KV: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs ``[T, V]`` and the final state of the delta rule without decay; see :func:`decay_only`."""
    return gated_delta_net(q_TK, k_TK, v_TV, torch.zeros_like(beta_T), beta_T, scale, state_KV)


def gated_delta_net(
    q_TK: Tensor, k_TK: Tensor, v_TV: Tensor, log_decay_T: Tensor, beta_T: Tensor, scale: float, state_KV: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs ``[T, V]`` and the final state of the delta rule with a scalar decay; see :func:`decay_only`."""
    identity = torch.eye(k_TK.shape[-1], dtype=k_TK.dtype, device=k_TK.device)
    outputs = []
    for q, k, v, decay, beta in zip(q_TK, k_TK, v_TV, log_decay_T.exp(), beta_T, strict=True):
        state_KV = decay * (identity - beta * torch.outer(k, k)) @ state_KV + beta * torch.outer(k, v)
        outputs.append(scale * (q @ state_KV))
    return _stacked(outputs, v_TV), state_KV


def diagonal_plus_low_rank(
    q_TK: Tensor,
    k_TK: Tensor,
    v_TV: Tensor,
    log_decay_TK: Tensor,
    a_TK: Tensor,
    b_TK: Tensor,
    scale: float,
    state_KV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return outputs ``[T, V]`` and the final state of general diagonal-plus-low-rank (DPLR) transitions.

    Parameters
    ----------
    log_decay_TK
        Natural log of the decay per token and channel, in ``(-inf, 0]`` (nats).
    a_TK, b_TK
        The two vectors of the rank-one part.
    q_TK, k_TK, v_TV, scale, state_KV
        As for :func:`decay_only`; k is written as it is, with no strength.
    """
    outputs = []
    for q, k, v, decay, a, b in zip(q_TK, k_TK, v_TV, log_decay_TK.exp(), a_TK, b_TK, strict=True):
        state_KV = (torch.diag(decay) - torch.outer(a, b)) @ state_KV + torch.outer(k, v)
        outputs.append(scale * (q @ state_KV))
    return _stacked(outputs, v_TV), state_KV


def dplr_of_kda(k_TK: Tensor, log_decay_TK: Tensor, beta_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the written key and the vectors a and b with which DPLR is Kimi Delta Attention: ``beta k``, ``beta k``, ``k exp(g)``."""
    written = beta_T[:, None] * k_TK
    return written, written, k_TK * log_decay_TK.exp()


def _stacked(outputs: list[Tensor], v_TV: Tensor) -> Tensor:
    return torch.stack(outputs) if outputs else v_TV
