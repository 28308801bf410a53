"""Laws of parameters: layer kinds, names, checkpoints, initial values, gradients; each a function of the package."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from model_cases import F64, close, made, random_tokens
from torch.nn.functional import softplus


def layer_kinds_follow_the_released_lists(kda: Any) -> None:
    """Full attention is in layers 4, 8, 12, 16, 20, 24 and 27, counted from one."""
    full = [4, 8, 12, 16, 20, 24, 27]
    released = kda.preset("48b-a3b")
    assert [i + 1 for i, kind in enumerate(released.layers) if kind == "full"] == full
    linear = released.to_mapping()["linear_attn_config"]
    assert linear["full_attn_layers"] == full
    assert linear["kda_layers"] == [i for i in range(1, 28) if i not in full]
    read = kda.KimiLinearConfig.from_mapping(released.to_mapping())
    assert [i + 1 for i, kind in enumerate(read.layers) if kind == "full"] == full
    with torch.device("meta"):
        model = kda.KimiLinear(released)
    assert [i + 1 for i, x in enumerate(model.model.layers) if hasattr(x.self_attn, "kv_b_proj")] == full
    assert [i for i, x in enumerate(model.model.layers) if hasattr(x, "mlp")] == [0]


def recomputation_changes_no_gradient(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64).train(), random_tokens(2, 9)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:], chunk=5 if recompute else 8192).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        close(again, kept)


def loss_ignores_places_without_target(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(1, 9)
    targets = tokens.roll(-1, 1)
    targets[0, ::2] = -1
    likelihood = model(tokens).log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    close(model.loss(tokens, targets).detach(), -likelihood[targets >= 0].mean().detach())


def checkpoints_come_back_bit_for_bit(kda: Any) -> None:
    """In one file and in shards, in any dtype, with every tensor under a name that is stored once."""
    for dtype, preset in ((torch.float32, "tiny"), (torch.bfloat16, "tiny-grouped-values")):
        model = made(kda, kda.preset(preset)).cast(dtype)
        for shard in (10**9, 20000):
            with tempfile.TemporaryDirectory() as folder:
                kda.checkpoint.save(model, folder, shard)
                assert (len(list(Path(folder).glob("*.safetensors"))) > 1) == (shard == 20000)
                again = kda.checkpoint.load(folder)
                assert again.config.to_mapping() == model.config.to_mapping()
                for (name, found), (_, expected) in zip(
                    again.state_dict().items(), model.state_dict().items(), strict=True
                ):
                    assert found.dtype == expected.dtype, name
                    assert torch.equal(found, expected), name
                tokens = random_tokens(1, 5)
                with torch.no_grad():
                    assert torch.equal(again.eval()(tokens), model(tokens))


def released_names_are_stored(kda: Any) -> None:
    model = made(kda, kda.preset("tiny"))
    shapes = {name: tuple(x.shape) for name, x in kda.checkpoint.released_tensors(model)}
    kda_part, full_part = "model.layers.1.self_attn.", "model.layers.3.self_attn."
    expected: dict[str, tuple[int, ...]] = {f"{kda_part}{x}_conv1d.weight": (16, 1, 4) for x in "qkv"}
    expected |= {f"{kda_part}{x}_proj.weight": (16, 32) for x in "qkv"}
    expected |= {f"{kda_part}{x}_a_proj.weight": (8, 32) for x in "fg"}
    expected |= {f"{kda_part}{x}_b_proj.weight": (16, 8) for x in "fg"}
    expected |= {f"{kda_part}A_log": (1, 1, 2, 1), f"{kda_part}dt_bias": (16,), f"{kda_part}o_norm.weight": (8,)}
    expected |= {f"{kda_part}b_proj.weight": (2, 32), f"{kda_part}o_proj.weight": (32, 16)}
    expected |= {f"{full_part}q_proj.weight": (24, 32), f"{full_part}kv_a_proj_with_mqa.weight": (16, 32)}
    expected |= {f"{full_part}kv_a_layernorm.weight": (12,)}
    expected |= {f"{full_part}kv_b_proj.weight": (32, 12), f"{full_part}o_proj.weight": (32, 16)}
    for layer in range(4):
        start = f"model.layers.{layer}."
        expected |= {f"{start}{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
        dense = {"mlp": 48} if layer == 0 else {"block_sparse_moe.shared_experts": 16}
        for part, width in dense.items():
            expected |= {f"{start}{part}.{x}_proj.weight": (width, 32) for x in ("gate", "up")}
            expected[f"{start}{part}.down_proj.weight"] = (32, width)
        if layer:
            moe = f"{start}block_sparse_moe."
            expected |= {f"{moe}gate.weight": (8, 32), f"{moe}gate.e_score_correction_bias": (8,)}
            expected |= {f"{moe}experts.{e}.{x}.weight": (16, 32) for e in range(8) for x in ("w1", "w3")}
            expected |= {f"{moe}experts.{e}.w2.weight": (32, 16) for e in range(8)}
    expected |= {"model.embed_tokens.weight": (64, 32), "lm_head.weight": (64, 32), "model.norm.weight": (32,)}
    repeated = ("model.layers.0.self_attn", "model.layers.2.self_attn")
    assert {name: shape for name, shape in shapes.items() if not name.startswith(repeated)} == expected


def gates_start_as_the_report_has_them(kda: Any) -> None:
    """``A_log = log U(1, 16)``, ``softplus(dt_bias)`` in 1e-3..1e-1 and log-uniform; they and the norms stay float32 and take no decay."""
    config = kda.preset("tiny").replace(kda_num_heads=64, kda_head_width=8)
    model = kda.initialise(kda.KimiLinear(config, "torch"), 0)
    for layer in model.model.layers[:3]:
        slope = layer.self_attn.A_log.detach().exp().flatten()
        assert bool(((slope >= 1) & (slope <= 16)).all())
        assert abs(float(slope.mean()) - 8.5) < 2
        step = softplus(layer.self_attn.dt_bias.detach().double())
        assert bool(((step > 0.99e-3) & (step < 1.01e-1)).all())
        assert abs(float(step.log().mean()) - math.log(1e-2)) < 0.2
    names = [name for name, _ in model.named_parameters() if kda.model.stays_float32(name)]
    kinds = {name.split(".", 3)[3] if "layers" in name else name for name in names}
    assert kinds == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.A_log", "self_attn.dt_bias",
        "self_attn.o_norm.weight", "self_attn.kv_a_layernorm.weight", "model.norm.weight",
    }  # fmt: skip
    model.cast(torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if kda.model.stays_float32(name) else torch.bfloat16), name
    assert all(router.e_score_correction_bias.dtype == torch.float32 for router in model.routers())
