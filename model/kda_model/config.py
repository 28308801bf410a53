"""The configuration of a model: what the released ``config.json`` says, and the switches of the report's ablations.

Two spellings are read and written: the released one, with ``linear_attn_config`` and layer lists counted from one, and the flat one
of ``transformers`` 5.23, with ``layer_types``. Keys that neither the architecture nor a switch needs are ignored when read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kda_reference.errors import DomainError

if TYPE_CHECKING:
    from collections.abc import Mapping

LayerType = Literal["kda", "full"]
MIXERS = ("kda", "gdn", "decay")
OUTPUT_GATES = ("sigmoid", "swish", "none")

# Field, released key, key of transformers. Fields that neither knows are written under their own name.
SPELLINGS: tuple[tuple[str, str, str], ...] = (
    ("vocab_size", "vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size", "hidden_size"),
    ("num_layers", "num_hidden_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads", "num_attention_heads"),
    ("intermediate_size", "intermediate_size", "intermediate_size"),
    ("expert_width", "moe_intermediate_size", "moe_intermediate_size"),
    ("num_experts", "num_experts", "num_local_experts"),
    ("num_chosen_experts", "num_experts_per_token", "num_experts_per_tok"),
    ("num_shared_experts", "num_shared_experts", "n_shared_experts"),
    ("num_expert_groups", "num_expert_group", "n_group"),
    ("num_chosen_groups", "topk_group", "topk_group"),
    ("routed_scaling_factor", "routed_scaling_factor", "routed_scaling_factor"),
    ("renormalise", "moe_renormalize", "norm_topk_prob"),
    ("latent_rank", "kv_lora_rank", "kv_lora_rank"),
    ("key_width", "qk_nope_head_dim", "qk_nope_head_dim"),
    ("shared_key_width", "qk_rope_head_dim", "qk_rope_head_dim"),
    ("value_width", "v_head_dim", "v_head_dim"),
    ("rms_norm_eps", "rms_norm_eps", "rms_norm_eps"),
    ("initializer_range", "initializer_range", "initializer_range"),
    ("max_length", "model_max_length", "max_position_embeddings"),
    ("tie_embeddings", "tie_word_embeddings", "tie_word_embeddings"),
    ("bos_id", "bos_token_id", "bos_token_id"),
    ("eos_id", "eos_token_id", "eos_token_id"),
    ("pad_id", "pad_token_id", "pad_token_id"),
)
LINEAR = {
    "kda_num_heads": ("num_heads", "linear_num_heads"),
    "kda_head_width": ("head_dim", "linear_head_dim"),
    "conv_width": ("short_conv_kernel_size", "linear_conv_kernel_dim"),
}
SWITCHES = ("kda_num_value_heads", "mixer", "output_gate", "short_convolution", "latent_eps", "rope_theta")
FULL_NAMES = {"full": "full_attention", "kda": "linear_attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiLinearConfig:
    """Sizes, kinds of layers and switches of one model; the defaults are the released 48B-A3B.

    Attributes
    ----------
    layer_types
        ``"kda"`` or ``"full"`` for each layer; ``None`` means three KDA layers to one of full attention, and the last layer full.
    num_dense_layers
        First layers with a dense MLP in place of experts; all, where there are no experts.
    kda_num_value_heads
        G of the KDA layers; ``None`` means as many as query/key heads.
    mixer
        ``"kda"``; ``"gdn"``, whose decay is the same in every channel of a head; ``"decay"``, that without the delta rule.
    output_gate
        ``"sigmoid"``, ``"swish"`` or ``"none"``.
    short_convolution
        ``False`` leaves the convolution of q, k and v out.
    use_nope
        ``False`` rotates the shared part of the keys of full attention by position.
    latent_eps
        Of ``kv_a_layernorm``, which does not follow ``rms_norm_eps``.
    max_length
        Longest text the model was made for, tokens; nothing depends on it.
    """

    vocab_size: int = 163840
    hidden_size: int = 2304
    num_layers: int = 27
    layer_types: tuple[LayerType, ...] | None = None
    num_heads: int = 32
    latent_rank: int = 512
    key_width: int = 128
    shared_key_width: int = 64
    value_width: int = 128
    use_nope: bool = True
    rope_theta: float = 10000.0
    latent_eps: float = 1e-6
    kda_num_heads: int = 32
    kda_num_value_heads: int | None = None
    kda_head_width: int = 128
    conv_width: int = 4
    mixer: str = "kda"
    output_gate: str = "sigmoid"
    short_convolution: bool = True
    intermediate_size: int = 9216
    num_dense_layers: int = 1
    num_experts: int = 256
    num_chosen_experts: int = 8
    num_shared_experts: int = 1
    expert_width: int = 1024
    num_expert_groups: int = 1
    num_chosen_groups: int = 1
    routed_scaling_factor: float = 2.446
    renormalise: bool = True
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    max_length: int = 1048576
    tie_embeddings: bool = False
    bos_id: int | None = 163584
    eos_id: int | None = 163586
    pad_id: int | None = 163839

    def __post_init__(self) -> None:
        """Check what no layer could check alone."""
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise self._error(
                "layer_types", f"have one entry for each of {self.num_layers} layers", len(self.layer_types)
            )
        unknown = set(self.layers) - {"kda", "full"}
        if unknown:
            raise self._error("layer_types", 'be "kda" or "full"', sorted(unknown))
        for name, allowed in (("mixer", MIXERS), ("output_gate", OUTPUT_GATES)):
            if getattr(self, name) not in allowed:
                raise self._error(name, f"be one of {', '.join(allowed)}", getattr(self, name))
        if self.num_value_heads % self.kda_num_heads:
            raise self._error("kda_num_value_heads", f"be a multiple of {self.kda_num_heads}", self.num_value_heads)
        if self.num_dense_layers < self.num_layers:
            if not 0 < self.num_chosen_experts <= self.num_experts:
                rule = f"lie in 1..num_experts={self.num_experts}"
                raise self._error("num_chosen_experts", rule, self.num_chosen_experts)
            if self.num_experts % self.num_expert_groups:
                raise self._error("num_expert_groups", f"divide {self.num_experts}", self.num_expert_groups)
        if not self.use_nope and self.shared_key_width % 2:
            raise self._error("shared_key_width", "be even to be rotated", self.shared_key_width)

    @staticmethod
    def _error(name: str, rule: str, value: object) -> DomainError:
        return DomainError(f"{name} must {rule}, got {value!r}; correct the configuration")

    @property
    def layers(self) -> tuple[LayerType, ...]:
        """Return the kind of each layer."""
        return three_to_one(self.num_layers) if self.layer_types is None else self.layer_types

    @property
    def num_value_heads(self) -> int:
        """Return G of the KDA layers."""
        return self.kda_num_heads if self.kda_num_value_heads is None else self.kda_num_value_heads

    def is_dense(self, layer: int) -> bool:
        """Return whether a layer, counted from zero, has a dense MLP."""
        return layer < self.num_dense_layers

    def replace(self, **changes: Any) -> KimiLinearConfig:  # noqa: ANN401 - any field may change
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def with_ratio(self, kda: int, full: int = 1) -> KimiLinearConfig:
        """Return a copy with layers in turns: ``kda`` KDA layers, then ``full`` of full attention, and the last one full.

        ``with_ratio(0)`` is the all-MLA baseline; ``with_ratio(1, 0)`` has no full attention at all.
        """
        return self.replace(layer_types=in_turns(self.num_layers, kda, full))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> KimiLinearConfig:
        """Read either spelling.

        Raises
        ------
        DomainError
            If a required part is missing or unknown to this project, such as ``q_lora_rank``.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        known = _known_fields(values)
        num_layers = known.get("num_layers", defaults["num_layers"])
        linear = values.get("linear_attn_config")
        types = _flat_layers(values) if linear is None else _released_layers(linear, num_layers)
        if types is not None:
            known["layer_types"] = types
        known["num_dense_layers"] = _num_dense(values, num_layers)
        for name, supported in (
            ("q_lora_rank", None),
            ("moe_layer_freq", 1),
            ("attention_bias", False),
            ("hidden_act", "silu"),
        ):
            if values.get(name, supported) != supported:
                raise cls._error(name, f"be {supported!r}", values[name])
        key_value_heads = values.get("num_key_value_heads")
        if key_value_heads not in (None, known.get("num_heads", defaults["num_heads"])):
            raise cls._error("num_key_value_heads", "equal num_attention_heads", key_value_heads)
        return cls(**known)

    def to_mapping(self, spelling: Literal["released", "transformers"] = "released") -> dict[str, Any]:
        """Write one of the spellings; switches that differ from the released model's are added under their own names."""
        column = 1 if spelling == "released" else 2
        written: dict[str, Any] = {"model_type": "kimi_linear", "architectures": ["KimiLinearForCausalLM"]}
        written |= {names[column]: getattr(self, names[0]) for names in SPELLINGS}
        written |= {"num_key_value_heads": self.num_heads, "q_lora_rank": None, "hidden_act": "silu"}
        linear = {names[column - 1]: getattr(self, field) for field, names in LINEAR.items()}
        switches = {name: getattr(self, name) for name in SWITCHES}
        defaults = {field.name: field.default for field in fields(self)}
        written |= {name: value for name, value in switches.items() if value != defaults[name]}
        if spelling == "transformers":
            dense = ["dense" if self.is_dense(layer) else "sparse" for layer in range(self.num_layers)]
            types = [FULL_NAMES[kind] for kind in self.layers]
            unrotated = {} if self.use_nope else {"mla_use_nope": False}
            return {**written, **linear, **unrotated, "layer_types": types, "mlp_layer_types": dense}
        for name, kind in (("full_attn_layers", "full"), ("kda_layers", "kda")):
            linear[name] = [layer + 1 for layer, found in enumerate(self.layers) if found == kind]
        if "kda_num_value_heads" in written:
            linear["num_v_heads"] = written.pop("kda_num_value_heads")
        written |= {"first_k_dense_replace": self.num_dense_layers, "moe_layer_freq": 1, "mla_use_nope": self.use_nope}
        return {**written, "linear_attn_config": linear}

    @classmethod
    def read(cls, path: Path | str) -> KimiLinearConfig:
        """Read a ``config.json``, or that of a checkpoint's folder."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_mapping(json.loads(path.read_text(encoding="utf-8")))


def in_turns(num_layers: int, kda: int, full: int = 1) -> tuple[LayerType, ...]:
    """Return ``kda`` KDA layers, then ``full`` of full attention, repeated; the last layer is full where any is."""
    kinds: tuple[LayerType, LayerType] = ("kda", "full")
    turn = [kinds[0]] * kda + [kinds[1]] * full
    if not turn:
        message = f"kda and full must not both be 0, got {kda} and {full}; a layer needs a kind"
        raise DomainError(message)
    types = [turn[layer % len(turn)] for layer in range(num_layers)]
    if full and types:
        types[-1] = "full"
    return tuple(types)


def three_to_one(num_layers: int) -> tuple[LayerType, ...]:
    """Return the released pattern: every fourth layer full, and the last one."""
    return in_turns(num_layers, 3)


def _known_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read what has one key in each spelling."""
    known = {field: values[key] for field, *keys in SPELLINGS for key in keys if key in values}
    linear, column = (values["linear_attn_config"], 0) if "linear_attn_config" in values else (values, 1)
    known |= {field: linear[names[column]] for field, names in LINEAR.items() if names[column] in linear}
    known |= {name: values[name] for name in SWITCHES if name in values}
    if column == 0 and "num_v_heads" in linear:
        known["kda_num_value_heads"] = linear["num_v_heads"]
    if "mla_use_nope" in values:
        known["use_nope"] = bool(values["mla_use_nope"])
    return known


def _released_layers(linear: Mapping[str, Any], num_layers: int) -> tuple[LayerType, ...]:
    kinds: dict[int, LayerType] = {}
    lists: tuple[tuple[str, LayerType], ...] = (("full_attn_layers", "full"), ("kda_layers", "kda"))
    for name, kind in lists:
        for number in linear[name]:
            if not 1 <= number <= num_layers or number in kinds:
                message = (
                    f"{name} must list layers 1..{num_layers} once, counted from one, got {number}; correct the lists"
                )
                raise DomainError(message)
            kinds[number] = kind
    missing = sorted(set(range(1, num_layers + 1)) - set(kinds))
    if missing:
        message = f"kda_layers and full_attn_layers must name every layer, got none for {missing}; correct the lists"
        raise DomainError(message)
    return tuple(kinds[number] for number in range(1, num_layers + 1))


def _flat_layers(values: Mapping[str, Any]) -> tuple[LayerType, ...] | None:
    if values.get("layer_types") is None:
        return None
    kinds: dict[str, LayerType] = {"full_attention": "full", "linear_attention": "kda"}
    for layer, name in enumerate(values["layer_types"]):
        if name not in kinds:
            message = (
                f"layer_types must be {' or '.join(kinds)}, got {name!r} at layer={layer}; correct the configuration"
            )
            raise DomainError(message)
    return tuple(kinds[name] for name in values["layer_types"])


def _num_dense(values: Mapping[str, Any], num_layers: int) -> int:
    types = values.get("mlp_layer_types")
    if types is None:
        if values.get("num_experts", values.get("num_local_experts", 1)) in (0, None):
            return num_layers
        return int(values.get("first_k_dense_replace", 1))
    number = types.index("sparse") if "sparse" in types else len(types)
    if "dense" in types[number:]:
        message = f"mlp_layer_types must have its dense layers first, got {types}; other orders are not supported"
        raise DomainError(message)
    return int(number)
