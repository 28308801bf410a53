"""Cases: one call described by a few words, from which inputs and cotangents follow bit for bit.

The text of a case, such as ``"T=130 G=2 K=32 gate=spikes seed=7"``, is what failures print, what rows carry and what ``kda
reproduce`` reads; a case holds no arrays. Fields at their default are left out of the text.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from kda_reference import KdaInputs

from kda_conformance import regimes
from kda_conformance.claims import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from kda_conformance.claims import Claims

RAW_NORM = 5.0
LARGEST_LOGIT = 40.0
SHALLOW = 4.0
SEEDS_APART = 1000
# The fp64 budget is the fp32 one scaled down, which holds while errors are linear in the unit roundoff: short of saturation.
LARGEST_WIDE_LOGIT = 14.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of the operator, by description.

    Attributes
    ----------
    T
        Tokens: one number, or the lengths of packed sequences.
    B, H, G, K, V
        Batch rows, query/key heads, value heads, key width, value width.
    gate
        Regime of the log decay, a key of ``regimes.GATES``.
    gate_form
        ``log_decay`` outside the kernel, ``softplus`` or ``bounded`` inside it.
    gate_dtype
        ``float32``, or ``input``: g and beta in the dtype of q; ``g`` or ``beta``: only that one is.
    keys, values, strengths
        Regimes of q and k, of v and of beta: keys of ``regimes.KEYS``, ``VALUES`` and ``STRENGTHS``.
    beta_max
        1, or 2 for negative eigenvalues.
    l2norm, sigmoid
        Whether these activations run in the kernel.
    state
        Whether an initial state is given.
    cotangent
        ``both``, ``o`` or ``state``.
    v_first
        States are ``[N, G, V, K]``.
    scale
        0 means the default ``K ** -0.5``.
    slope, bias
        Whether ``A_log`` is given to a bounded gate, and ``dt_bias`` to either gate.
    shallow
        Whether the slope of the gate is ``e^-4`` of the layer's, so that a strong decay takes a large logit.
    bound
        ``lower_bound`` of a bounded gate, nats; a decay beyond it saturates the gate.
    safe
        Whether the caller promises, by ``safe_gate``, that a log decay given from outside does not go below ``bound``.
    seed
        Of everything drawn.
    """

    T: tuple[int, ...] = (64,)
    B: int = 1
    H: int = 1
    G: int = 1
    K: int = 32
    V: int = 32
    gate: str = "moderate"
    gate_form: str = "log_decay"
    gate_dtype: str = "float32"
    keys: str = "random"
    values: str = "normal"
    strengths: str = "random"
    beta_max: int = 1
    l2norm: bool = False
    sigmoid: bool = False
    state: bool = True
    cotangent: str = "both"
    v_first: bool = False
    scale: float = 0.0
    slope: bool = True
    bias: bool = True
    shallow: bool = False
    bound: float = regimes.LOWER_BOUND
    safe: bool = False
    seed: int = 0

    @property
    def packed(self) -> bool:
        """Whether the call packs several sequences."""
        return len(self.T) > 1

    @property
    def num_tokens(self) -> int:
        """Return T of the call: the packed total."""
        return sum(self.T)

    def __str__(self) -> str:
        """Return the text that :meth:`parse` reads back."""
        words = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default or item.name == "T":
                text = (
                    ",".join(map(str, value))
                    if item.name == "T"
                    else str(int(value))
                    if isinstance(value, bool)
                    else str(value)
                )
                words.append(f"{item.name}={text}")
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read the text of a case.

        Raises
        ------
        UsageError
            If a word is not ``field=value`` of a known field.
        """
        types: dict[str, type[Any]] = {item.name: type(item.default) for item in fields(cls)}
        found: dict[str, Any] = {}
        for word in text.split():
            name, _, value = word.partition("=")
            if name not in types or not value:
                message = f"a case must be words field=value with fields {sorted(types)}, got {word!r}; copy it from a failure"
                raise UsageError(message)
            try:
                found[name] = (
                    tuple(int(n) for n in value.split(","))
                    if name == "T"
                    else bool(int(value))
                    if types[name] is bool
                    else types[name](value)
                )
            except ValueError as error:
                message = f"{name} of a case must be a {types[name].__name__}, got {value!r}; copy it from a failure"
                raise UsageError(message) from error
        return cls(**found)

    def replace(self, **changes: Any) -> Case:  # noqa: ANN401 - any field may change
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def redrawn(self, number: int) -> Case:
        """Return the case with everything drawn anew; number 0 is the case itself."""
        return self.replace(seed=self.seed + number * SEEDS_APART)

    def unclaimed(self, claims: Claims) -> str | None:
        """Return the claim this case needs and does not have, or ``None``."""
        needs = {
            "packed": self.packed,
            "grouped_values": self.G != self.H,
            "initial_state": self.state,
            "state_v_first": self.v_first,
            "scale": self.scale != 0,
            "l2norm_in_kernel": self.l2norm,
            "gate_in_kernel": self.gate_form != "log_decay",
            "bounded_gate": self.gate_form == "bounded" or self.safe,
            "wide_gate": self.gate_dtype != "input",
            "beta_sigmoid_in_kernel": self.sigmoid,
            "allow_neg_eigval": self.sigmoid and self.beta_max > 1,
            "empty": 0 in self.T,
        }
        for name, needed in needs.items():
            if needed and not getattr(claims, name):
                return name
        activation = claims.unclaimed_activation(
            gate=self.gate_form != "log_decay",
            bounded=self.gate_form == "bounded" or self.safe,
            l2norm=self.l2norm,
            beta_sigmoid=self.sigmoid,
        )
        if activation is not None:
            return activation
        if claims.head_widths is not None and not {self.K, self.V} <= claims.head_widths:
            return f"head_widths={sorted(claims.head_widths)}"
        if claims.max_k_width is not None and claims.max_k_width < self.K:
            return f"max_k_width={claims.max_k_width}"
        return None

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> KdaInputs:
        """Draw the arguments of the call; all randomness follows from the case."""
        draw = regimes.Draw(self.seed)
        batch, tokens = self.B, self.num_tokens
        heads, group_heads = (batch, tokens, self.H), (batch, tokens, self.G)
        q = regimes.KEYS["random" if self.keys in ("near", "same", "orthogonal") else self.keys](draw, (*heads, self.K))
        k = regimes.KEYS[self.keys](draw, (*heads, self.K))
        if self.l2norm:
            q, k = q * RAW_NORM, k * RAW_NORM
        v = regimes.VALUES[self.values](draw, (*group_heads, self.V))
        decay = regimes.GATES[self.gate](draw, (*group_heads, self.K))
        if self.safe:
            decay = decay.clamp(min=self.bound)
        beta = regimes.STRENGTHS[self.strengths](draw, group_heads) * self.beta_max
        state = draw.normal((len(self.T) if self.packed else batch, self.G, self.K, self.V)) if self.state else None
        parameters = self._gate(draw, decay, wide=dtype == torch.float64)
        if self.sigmoid:
            odds = (beta / self.beta_max).clamp(1e-18, 1 - 1e-15)
            limit = LARGEST_WIDE_LOGIT if dtype == torch.float64 else LARGEST_LOGIT
            beta = (odds / (1 - odds)).log().clamp(-limit, limit)
        if state is not None:
            state = state if dtype == torch.float64 else state.float()
            if self.v_first:
                state = state.transpose(-1, -2).contiguous()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        g_dtype, beta_dtype = (dtype if self.gate_dtype in ("input", name) else wide for name in ("g", "beta"))
        arguments = KdaInputs(
            q=q.to(dtype),
            k=k.to(dtype),
            v=v.to(dtype),
            g=parameters.pop("g").to(g_dtype),
            beta=beta.to(beta_dtype),
            initial_state=state,
            cu_seqlens=torch.tensor([sum(self.T[:i]) for i in range(len(self.T) + 1)]) if self.packed else None,
            scale=self.scale or None,
            use_qk_l2norm_in_kernel=self.l2norm,
            use_gate_in_kernel=self.gate_form != "log_decay",
            use_beta_sigmoid_in_kernel=self.sigmoid,
            allow_neg_eigval=self.sigmoid and self.beta_max > 1,
            safe_gate=self.gate_form == "bounded" or self.safe,
            lower_bound=self.bound if self.gate_form == "bounded" or self.safe else None,
            state_v_first=self.v_first,
        )
        return move(arguments.replace(**{name: tensor.to(wide) for name, tensor in parameters.items()}), device)

    def _gate(self, draw: regimes.Draw, decay: Tensor, *, wide: bool) -> dict[str, Tensor]:
        """Return ``g`` and the gate's parameters such that the gate's log decay is ``decay`` up to rounding."""
        if self.gate_form == "log_decay":
            return {"g": decay}
        a_log, dt_bias = regimes.layer_parameters(draw, self.G, self.K)
        if self.shallow:
            a_log = a_log - SHALLOW
        slope = a_log.exp()[:, None]
        if self.gate_form == "softplus":
            target = (-decay / slope).clamp(min=1e-6 if wide else 1e-18)
            x = target + (-torch.expm1(-target)).log()
        else:
            least = 1e-6 if wide else 1e-12
            share = (decay / self.bound).clamp(least, 1 - least)
            x = (share / (1 - share)).log() / (slope if self.slope else 1)
        found = {"g": x - dt_bias.reshape(self.G, self.K) if self.bias else x}
        if self.slope or self.gate_form == "softplus":
            found["A_log"] = a_log
        return {**found, "dt_bias": dt_bias} if self.bias else found

    def cotangents(self, inputs: KdaInputs) -> tuple[Tensor | None, Tensor | None]:
        """Draw the cotangents of ``o`` and of the final state, each ``None`` when the case leaves it out."""
        draw = regimes.Draw(self.seed + 1_000_003)
        do = draw.normal(tuple(inputs.v.shape)).to(inputs.v.dtype)
        dstate = draw.normal(inputs.state_shape).to(torch.float64 if inputs.v.dtype == torch.float64 else torch.float32)
        device = inputs.v.device
        return (
            None if self.cotangent == "state" else do.to(device),
            None if self.cotangent == "o" else dstate.to(device),
        )


def move(inputs: KdaInputs, device: str) -> KdaInputs:
    """Return the same call on another device."""
    names = [*inputs.tensors(), *(["cu_seqlens"] if inputs.cu_seqlens is not None else [])]
    return inputs.replace(**{name: getattr(inputs, name).to(device) for name in names})
