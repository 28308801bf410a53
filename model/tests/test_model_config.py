"""Configurations are read and written in both spellings, and what contradicts itself is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kda_model import PRESETS, KimiLinear, KimiLinearConfig, Packing, checkpoint, find_operator, pack, preset
from kda_model.checkpoint import CheckpointError
from kda_model.config import in_turns
from kda_model.decode_graph import DecodeGraph
from kda_model.generate import generate
from kda_model.sampling import Sampling
from kda_reference.errors import DeviceError, DomainError, DtypeError, KdaError, PackingError, ShapeError
from model_cases import made, package, random_tokens
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

# As published with the released weights; keys that describe files or tokenisers are left out.
RELEASED: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"], "bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839,
    "first_k_dense_replace": 1, "head_dim": 72, "hidden_act": "silu", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "kv_lora_rank": 512, "mla_use_nope": True, "model_max_length": 1048576, "model_type": "kimi_linear",
    "moe_intermediate_size": 1024, "moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32, "num_expert_group": 1, "num_experts": 256, "num_experts_per_token": 8, "num_hidden_layers": 27,
    "num_key_value_heads": 32, "num_shared_experts": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446, "tie_word_embeddings": False, "topk_group": 1, "v_head_dim": 128,
    "vocab_size": 163840,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
    },
}  # fmt: skip


def resolved(config: KimiLinearConfig) -> KimiLinearConfig:
    return config.replace(layer_types=config.layers)


def test_released_file_is_the_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert KimiLinearConfig.read(tmp_path) == resolved(preset("48b-a3b"))
    written = preset("48b-a3b").to_mapping()
    missing = {key: value for key, value in RELEASED.items() if written.get(key) != value}
    assert missing.keys() == {"head_dim", "moe_router_activation_func"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spelling", ["released", "transformers"])
def test_presets_come_back_from_both_spellings(name: str, spelling: Any) -> None:
    written = json.loads(json.dumps(preset(name).to_mapping(spelling)))
    assert KimiLinearConfig.from_mapping(written) == resolved(preset(name))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spelling=st.sampled_from(["released", "transformers"]),
    types=st.lists(st.sampled_from(["kda", "full"]), min_size=1, max_size=9),
    dense=st.integers(0, 3),
    groups=st.sampled_from([1, 2, 4]),
    mixer=st.sampled_from(["kda", "gdn", "decay"]),
    gate=st.sampled_from(["sigmoid", "swish", "none"]),
    switches=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_every_switch_comes_back(
    spelling: Any, types: list[Any], dense: int, groups: int, mixer: str, gate: str, switches: tuple[bool, bool, bool]
) -> None:
    config = preset("tiny").replace(
        num_layers=len(types), layer_types=tuple(types), num_dense_layers=min(dense, len(types)), num_expert_groups=groups, mixer=mixer,
        output_gate=gate, short_convolution=switches[0], use_nope=switches[1], tie_embeddings=switches[2], kda_num_value_heads=6,
        latent_eps=1e-5, rope_theta=5e5,
    )  # fmt: skip
    assert KimiLinearConfig.from_mapping(json.loads(json.dumps(config.to_mapping(spelling)))) == config


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        ((3, 1), "kkkfkkkf"),
        ((0, 1), "ffffffff"),
        ((1, 1), "kfkfkfkf"),
        ((7, 1), "kkkkkkkf"),
        ((15, 1), "kkkkkkkf"),
        ((1, 0), "kkkkkkkk"),
    ],
)
def test_ratios_of_the_report(ratio: tuple[int, int], expected: str) -> None:
    types = preset("tiny").replace(num_layers=8, layer_types=None).with_ratio(*ratio).layers
    assert "".join(kind[0] for kind in types) == expected
    assert in_turns(16, 15) == ("kda",) * 15 + ("full",)


@pytest.mark.parametrize("ratio", [(0, 1), (1, 1), (1, 0)])
@pytest.mark.parametrize("mixer", ["kda", "gdn", "decay"])
def test_baselines_decode_what_they_read(ratio: tuple[int, int], mixer: str) -> None:
    kda = package()
    model = made(kda, kda.preset("tiny").replace(mixer=mixer).with_ratio(*ratio))
    tokens = random_tokens(2, 6)
    with torch.no_grad():
        cache = model.new_cache(2)
        steps = torch.cat([model(tokens[:, t : t + 1], cache=cache) for t in range(6)], 1)
        torch.testing.assert_close(steps, model(tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q_lora_rank": 1536}, "q_lora_rank must be None, got 1536"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must equal num_attention_heads, got 8"),
        ({"num_experts_per_token": 300}, r"num_chosen_experts must lie in 1..num_experts=256, got 300"),
        ({"num_expert_group": 3}, "num_expert_groups must divide 256, got 3"),
        ({"output_gate": "tanh"}, "output_gate must be one of sigmoid, swish, none, got 'tanh'"),
        ({"mla_use_nope": False, "qk_rope_head_dim": 63}, "shared_key_width must be even to be rotated, got 63"),
        ({"num_hidden_layers": 26}, "full_attn_layers must list layers 1..26 once, counted from one, got 27"),
        ({"num_hidden_layers": 28}, r"must name every layer, got none for \[28\]"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "dense layers first"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(DomainError, match=match):
        KimiLinearConfig.from_mapping({**RELEASED, **changes})


def test_layer_lists_counted_from_zero_are_refused() -> None:
    linear = {**RELEASED["linear_attn_config"], "full_attn_layers": [3, 7, 11, 15, 19, 23, 26]}
    linear["kda_layers"] = [layer for layer in range(27) if layer not in linear["full_attn_layers"]]
    with pytest.raises(DomainError, match="counted from one, got 0"):
        KimiLinearConfig.from_mapping({**RELEASED, "linear_attn_config": linear})
    with pytest.raises(
        DomainError, match="layer_types must be full_attention or linear_attention, got 'swa' at layer=1"
    ):
        KimiLinearConfig.from_mapping({"num_hidden_layers": 2, "layer_types": ["full_attention", "swa"]})
    with pytest.raises(DomainError, match="have one entry for each of 4 layers, got 2"):
        preset("tiny").replace(layer_types=("kda", "full"))


def test_misuse_is_refused() -> None:
    model, cpu = made(package(), preset("tiny")), torch.device("cpu")
    tokens = random_tokens(2, 4)
    cases: list[tuple[type[KdaError], str, Any]] = [
        (DtypeError, "tokens must be int64, got torch.float32", lambda: model(tokens.float())),
        (DomainError, r"tokens must lie in 0..63, got 64", lambda: model(tokens + 64 - tokens.max())),
        (DomainError, r"tokens must lie in 0..63, got -1", lambda: model(tokens - tokens.min() - 1)),
        (ShapeError, "tokens must have one row with a packing, got 2", lambda: model(tokens, Packing((4, 4), cpu))),
        (PackingError, "lengths must add up to T=4, got 3", lambda: model(tokens[:1], Packing((1, 2), cpu))),
        (PackingError, "lengths must not be negative, got -1 at n=1", lambda: Packing((1, -1), cpu)),
        (PackingError, "lengths must name at least one sequence", lambda: pack([], cpu)),
        (PackingError, "cu_seqlens must start at 0", lambda: Packing.from_cu_seqlens(torch.tensor([1, 4]))),
        (
            DomainError,
            "cache must be None where gradients are recorded",
            lambda: model(tokens, cache=model.new_cache(2)),
        ),
        (DomainError, r"rows must lie in 0..1, got 2", lambda: model.new_cache(2).fork([2])),
        (
            DomainError,
            "prompts must have at least one token each, got none at n=1",
            lambda: generate(model, [[1], []], max_new_tokens=1),
        ),
        (DomainError, "max_new_tokens must be at least 1, got 0", lambda: generate(model, [[1]], max_new_tokens=0)),
        (DomainError, "temperature must be >= 0", lambda: Sampling(temperature=-1)),
        (DomainError, r"top_p must lie in \(0, 1\]", lambda: Sampling(top_p=0)),
        (DomainError, "operator must be triton, torch, reference", lambda: find_operator("cuda", cpu)),
        (
            DomainError,
            "operator must be loadable, got 'kda_reference:no'",
            lambda: find_operator("kda_reference:no", cpu),
        ),
        (DomainError, "operator must be loadable", lambda: find_operator("nowhere.py:f", cpu)),
        (DomainError, "operator must be callable", lambda: find_operator("kda_model.config:MIXERS", cpu)),
        (DomainError, "preset must be one of", lambda: preset("70b")),
        (DeviceError, "model must be on a CUDA device", lambda: DecodeGraph(model, model.new_cache(1), 4)),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()
    with torch.no_grad(), pytest.raises(DomainError, match="tokens must belong to the cache's 3 sequences, got 2"):
        model(tokens, cache=model.new_cache(3))


@pytest.mark.parametrize("operator", ["torch", "triton", "reference"])
def test_calls_may_have_no_tokens(operator: str) -> None:
    device = torch.device("cuda" if operator == "triton" and torch.cuda.is_available() else "cpu")
    model = made(package(), preset("tiny"), operator=operator).to(device)
    nothing, something = torch.zeros(2, 0, dtype=torch.int64, device=device), random_tokens(2, 1).to(device)
    with torch.no_grad():
        cache = model.new_cache(2)
        assert model(nothing).shape == model(nothing, cache=cache).shape == (2, 0, 64)
        tokens, packing = pack([[], []], device)
        assert model(tokens, packing, cache).shape == (1, 0, 64)
        assert cache.lengths == [0, 0]
        torch.testing.assert_close(model(something, cache=cache), model(something), rtol=1e-3, atol=1e-4)


def test_packing_from_offsets_is_packing_from_lengths() -> None:
    packing = Packing.from_cu_seqlens(torch.tensor([0, 3, 3, 5]))
    assert packing.lengths == (3, 0, 2)
    assert packing.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert packing.positions.tolist() == [[0, 1, 2, 0, 1]]


def test_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    model = made(package(), preset("tiny"))
    with torch.no_grad():
        cache = model.new_cache(1)
        model(random_tokens(1, 3), cache=cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(DomainError, match="file must hold the cache of this model"):
        type(cache).load(tmp_path / "cache", preset("tiny-grouped-values"))


def test_checkpoints_are_accounted_for(tmp_path: Path) -> None:
    """Missing, unexpected, of another shape, twice, of two dtypes: each is refused and named."""
    model = made(package(), preset("tiny"))
    checkpoint.save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    changed: dict[str, dict[str, torch.Tensor]] = {
        f"1 missing: {expert}": {name: x for name, x in tensors.items() if name != expert},
        "1 unexpected: model.layers.4.extra": {**tensors, "model.layers.4.extra": torch.zeros(1)},
        r"of another shape: model.norm.weight \(31,\) for \(32,\)": {**tensors, "model.norm.weight": torch.zeros(31)},
        "must have one dtype for all experts": {**tensors, expert: tensors[expert].bfloat16()},
        "8 missing: .* 8 unexpected": {
            name.replace("w1", "w4"): x for name, x in tensors.items() if "layers.1" in name or "w1" not in name
        }
        | {name: x for name, x in tensors.items() if "layers.1" not in name and "w1" in name},
    }
    for match, wrong in changed.items():
        save_file(wrong, path)
        with pytest.raises(CheckpointError, match=match):
            checkpoint.load(tmp_path)
    save_file(tensors, path)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "more.safetensors")
    with pytest.raises(
        CheckpointError, match=r"must hold model.norm.weight once, got it in model.safetensors and more.safetensors"
    ):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="must hold the safetensors files"):
        checkpoint.load(tmp_path / "nowhere", config=preset("tiny"))


def test_loading_maps_files_and_changes_to_the_model_do_not_reach_them(tmp_path: Path) -> None:
    model = made(package(), preset("tiny"))
    checkpoint.save(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = checkpoint.load(tmp_path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert isinstance(loaded, KimiLinear)
