"""The laws of the model, each a function of the package, so that a copy with a planted bug can be put to them too.

Laws between two computations are stated in float64, where correct computations agree to some 1e-14.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kda_reference.activations import inverse_norm
from kda_reference.errors import DomainError
from kda_reference.kda_layer import kda_layer
from kda_reference.related import decay_only, gated_delta_net
from model_budget import judge, score
from model_cases import close, evaluate, made, random_tokens, truth
from torch.nn.functional import silu, softplus

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

F64 = torch.float64
MIXED_LENGTHS = (7, 1, 0, 3, 2, 12, 4)


def in_budget(kda: Any, preset: str) -> None:
    """Logits, hidden states, loss and every gradient are as far from the float64 reference as float32 explains."""
    expected, tokens = truth(preset)
    verdict = judge(evaluate(kda, made(kda, kda.preset(preset)), tokens, expected.routing), expected)
    assert verdict.score <= 1, verdict


def matches_reference(kda: Any) -> None:
    in_budget(kda, "tiny")


def matches_reference_with_grouped_values(kda: Any) -> None:
    in_budget(kda, "tiny-grouped-values")


def chooses_the_experts_of_the_reference(kda: Any) -> None:
    """Unforced, the model takes the reference's experts wherever they are not tied within rounding."""
    expected, tokens = truth("tiny")
    assert expected.margin > 1e-6, "the case has a tie; its routing would be decided by rounding"
    model = made(kda, kda.preset("tiny"))
    with torch.no_grad():
        logits = model(tokens)
    for index, layer in enumerate(model.model.layers[1:], 1):
        found = layer.block_sparse_moe.gate.last.indices
        assert torch.equal(found.sort(-1).values, expected.routing[index].sort(-1).values)
    assert score(logits, expected.budgets["logits"]) <= 1


def prefill_then_decode_is_the_whole(kda: Any) -> None:
    """At every split, with prompts shorter than the convolution's kernel too."""
    for preset in ("tiny", "tiny-grouped-values"):
        model, tokens = made(kda, kda.preset(preset), dtype=F64), random_tokens(2, 11)
        with torch.no_grad():
            whole = model(tokens)
            for split in (1, 2, 3, 4, 9):
                cache = model.new_cache(2, page_len=4)
                parts = [model(tokens[:, :split], cache=cache)]
                parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(split, 11)]
                close(torch.cat(parts, 1), whole)
                assert cache.lengths == [11, 11] == cache.device_lengths.tolist()


def prefill_in_chunks_is_prefill(kda: Any) -> None:
    """Of ragged prompts, each chunk length, those that pages and kernels do not divide included."""
    model = made(kda, kda.preset("tiny"), dtype=F64)
    prompts = [random_tokens(n, seed=n).tolist() for n in (9, 1, 14, 3)]
    with torch.no_grad():
        ends = [model(torch.tensor([prompt]))[0, -1] for prompt in prompts]
        for chunk in (1, 2, 5, 64):
            cache = model.new_cache(4, page_len=4)
            close(kda.generate.prefill(model, prompts, cache, chunk), torch.stack(ends))
            assert cache.lengths == [9, 1, 14, 3]


def one_token_of_one_sequence_decodes(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(1, 3)
    with torch.no_grad():
        cache = model.new_cache(1)
        parts = [model(tokens[:, t : t + 1], cache=cache) for t in range(3)]
        assert parts[0].shape == (1, 1, 64)
        close(torch.cat(parts, 1), model(tokens))


def packed_sequences_are_separate_sequences(kda: Any) -> None:
    """Forward, and the gradient of a loss on all; attention, state and convolution leak nothing."""
    for preset in ("tiny", "tiny-grouped-values"):
        model = made(kda, kda.preset(preset), dtype=F64)
        rows = [random_tokens(n, seed=n).tolist() for n in MIXED_LENGTHS]
        tokens, packing = kda.pack(rows, torch.device("cpu"))
        packed = model(tokens, packing)
        weights = torch.randn(packed.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
        (packed * weights).sum().backward()
        together = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        for row, part in zip(rows, packing.slices(), strict=True):
            if row:
                alone = model(torch.tensor([row]))
                close(packed[:, part].detach(), alone.detach())
                (alone * weights[:, part]).sum().backward()
        for found, parameter in zip(together, model.parameters(), strict=True):
            close(found, parameter.grad)


def rows_of_a_batch_are_independent(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(3, 9)
    with torch.no_grad():
        together = model(tokens)
        for row in range(3):
            close(together[row : row + 1], model(tokens[row : row + 1]))
        changed = tokens.clone()
        changed[1] = (changed[1] + 1) % 64
        close(model(changed)[[0, 2]], together[[0, 2]])


def later_tokens_change_nothing_before_them(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(1, 20)
    with torch.no_grad():
        before = model(tokens)
        for place in (1, 7, 19):
            changed = tokens.clone()
            changed[0, place:] = (changed[0, place:] + 1) % 64
            close(model(changed)[:, :place], before[:, :place])


def decode_rows_do_not_see_each_other(kda: Any) -> None:
    """Not even NaN passes from one sequence's memory to another, or from the unused end of a page into a value."""
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(2, 8)
    with torch.no_grad():
        clean, dirty = (model.new_cache(2, page_len=4) for _ in range(2))
        model(tokens[:, :6], cache=clean)
        model(tokens[:, :6], cache=dirty)
        dirty.pages.pool[:, [table[-1] for table in dirty.tables], 2:] = torch.nan
        unused = set(range(len(dirty.pages.users))) - {page for table in dirty.tables for page in table}
        dirty.pages.pool[:, sorted(unused)] = torch.nan
        for t in (6, 7):
            close(model(tokens[:, t : t + 1], cache=dirty), model(tokens[:, t : t + 1], cache=clean))
        for memory in dirty.memories.values():
            memory.state[0] = torch.nan
        found = model(tokens[:, :1], cache=dirty)
        assert bool(found[0].isnan().all())
        close(found[1], model(tokens[:, :1], cache=clean)[1])
        dirty.reset()
        clean.reset()
        assert dirty.lengths == [0, 0] == dirty.device_lengths.tolist()
        close(model(tokens, cache=dirty), model(tokens))


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


def full_attention_knows_no_positions(kda: Any) -> None:
    """Earlier tokens of one layer may be exchanged; with rotated keys they may not, but all may move together."""
    config = kda.preset("tiny-dense").replace(num_layers=1, num_dense_layers=1).with_ratio(0)
    model, tokens = made(kda, config, dtype=F64), random_tokens(1, 8)
    exchanged = tokens[:, [3, 0, 5, 1, 2, 4, 6, 7]]
    with torch.no_grad():
        close(model(exchanged)[:, 6:], model(tokens)[:, 6:])
        rotated = made(kda, config.replace(use_nope=False), dtype=F64)
        rotated.load_state_dict(model.state_dict())
        assert not torch.allclose(rotated(exchanged)[:, 6:], rotated(tokens)[:, 6:])
        x = torch.randn(1, 8, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
        attention, places = rotated.model.layers[0].self_attn, torch.arange(8)[None]
        close(attention(x, places), attention(x, places + 1000))
        cache = rotated.new_cache(1, page_len=4)
        parts = [rotated(tokens[:, :5], cache=cache)]
        parts += [rotated(tokens[:, t : t + 1], cache=cache) for t in (5, 6, 7)]
        close(torch.cat(parts, 1), rotated(tokens))
        row, packing = kda.pack([tokens[0, :3].tolist(), tokens[0].tolist()], torch.device("cpu"))
        close(rotated(row, packing)[:, 3:], rotated(tokens))


def routing_weighs_by_scores_and_chooses_by_bias(kda: Any) -> None:
    config = kda.preset("tiny").replace(num_expert_groups=2)
    model = made(kda, config, dtype=F64)
    router = next(model.routers())
    x = torch.randn(40, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    routing = router(x)
    close(routing.weights.sum(-1), torch.full((40,), 2.446, dtype=F64))
    scores = torch.sigmoid(x @ router.weight.T).gather(-1, routing.indices)
    close(routing.weights, 2.446 * scores / scores.sum(-1, keepdim=True))
    assert torch.equal(routing.indices // 4, routing.indices[:, :1].expand(-1, 2) // 4), "one of two groups is chosen"
    with torch.no_grad():
        router.e_score_correction_bias += 5
        assert torch.equal(router(x).indices, routing.indices)
        router.e_score_correction_bias[3] += 5
        assert bool((router(x).indices == 3).any(-1).all())
        close(router(x).weights.sum(-1), torch.full((40,), 2.446, dtype=F64))


def experts_compute_alike_one_by_one_gathered_and_grouped(kda: Any) -> None:
    """Values and gradients, with experts that nobody chose and widths that alignment divides."""
    config = kda.preset("tiny")
    experts = kda.experts.Experts(config)
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    chosen = torch.tensor([0] * 9 + [2] * 3 + [7] * 5)
    x = torch.randn(len(chosen), 32, generator=generator, requires_grad=True)
    upstream = torch.randn(len(chosen), 32, generator=generator)
    results = []
    for form in (experts._one_by_one, experts._gathered, experts._grouped):
        y = form(x, chosen)
        results.append([y, *torch.autograd.grad((y * upstream).sum(), [x, *experts.parameters()])])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def biases_move_towards_an_even_load(kda: Any) -> None:
    """Counted in training alone and once with recomputation; under them a skewed router becomes even."""
    model = made(kda, kda.preset("tiny")).train()
    tokens = random_tokens(4, 16)
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(tokens).sum().backward()
        for router in model.routers():
            assert int(router.load.sum()) == 4 * 16 * 2
            before, load = router.e_score_correction_bias.clone(), router.load.double()
            router.balance(0.25)
            expected = 0.25 * torch.sign(load.mean() - load).float()
            torch.testing.assert_close(router.e_score_correction_bias - before, expected)
            assert not router.load.any()
    model.eval()(tokens)
    assert not any(router.load.any() for router in model.routers())
    router, x = next(model.routers()), torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    router.train().e_score_correction_bias.zero_()[0] = 0.8
    spreads = []
    for _ in range(60):
        router(x)
        spreads.append(float(router.load.double().std()))
        router.balance(0.02)
    assert spreads[-1] < spreads[0] / 4


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


def one_decay_per_head_is_the_same_decay_in_every_channel(kda: Any) -> None:
    """The GDN layer is the KDA layer of the reference whose gate is alike in every channel, and Gated DeltaNet underneath."""
    config = kda.preset("tiny").replace(mixer="gdn")
    layer = made(kda, config, dtype=F64).model.layers[1].self_attn
    x = torch.randn(2, 9, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    weights["f_b_proj.weight"] = torch.eye(2, dtype=F64).repeat_interleave(8, 0)
    weights["f_a_proj.weight"], weights["dt_bias"] = (
        weights.pop("a_proj.weight"),
        weights["dt_bias"].repeat_interleave(8),
    )
    expected, _ = kda_layer(x, weights, heads=(2, 2), eps=1e-5)
    close(layer(x, kda.find_operator("torch", x.device))[0].detach(), expected)
    close(layer(x, kda.find_operator("torch", x.device))[0].detach(), _by_recurrence(layer, x, gated_delta_net))


def decay_without_the_delta_rule_erases_nothing(kda: Any) -> None:
    """To 2^-30 of what is written."""
    config = kda.preset("tiny").replace(mixer="decay")
    layer = made(kda, config, dtype=F64).model.layers[1].self_attn
    x = torch.randn(2, 9, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = layer(x, kda.find_operator("torch", x.device))[0].detach()
    expected = _by_recurrence(layer, x, decay_only)
    assert float((found - expected).abs().max()) < 9 * 2.0**-30 * float(expected.abs().max())
    assert not torch.allclose(found, _by_recurrence(layer, x, gated_delta_net), rtol=1e-3)


def _by_recurrence(layer: Any, x: Tensor, recurrence: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """Compute a layer of two heads of width 8, one head and row at a time."""
    q, k, v, _ = layer._operands(x, None, None)
    q, k = (y * inverse_norm(y) for y in (q, k))
    decay = -layer.A_log.flatten().exp() * softplus(layer.a_proj(x) + layer.dt_bias)
    beta = torch.sigmoid(layer.b_proj(x))
    o = torch.empty_like(v)
    for row in range(x.shape[0]):
        for head in range(2):
            operands = (y[row, :, head] for y in (q, k, v, decay, beta))
            o[row, :, head], _ = recurrence(*operands, 8**-0.5, torch.zeros(8, 8, dtype=F64))
    gate = layer.g_b_proj(layer.g_a_proj(x)).unflatten(-1, (2, 8))
    y: Tensor = layer.o_proj(layer.o_norm(o, gate).flatten(2)).detach()
    return y


def switches_change_what_they_name(kda: Any) -> None:
    """No convolution is a convolution of the current token alone; the output gate is sigmoid, swish or one."""
    config, tokens = kda.preset("tiny-dense"), random_tokens(2, 9)
    model = made(kda, config, dtype=F64)
    state = model.state_dict()
    with torch.no_grad():
        bare = made(kda, config.replace(short_convolution=False), dtype=F64)
        bare.load_state_dict({name: x for name, x in state.items() if "conv1d" not in name})
        for name in state:
            if "conv1d" in name:
                state[name].zero_()
                state[name][..., -1] = 1
        model.load_state_dict(state)
        close(bare(tokens), model(tokens))
        cache = bare.new_cache(2)
        close(torch.cat([bare(tokens[:, t : t + 1], cache=cache) for t in range(9)], 1), bare(tokens))
        x = torch.randn(2, 5, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
        operator = kda.find_operator("torch", x.device)
        layer = model.model.layers[0].self_attn
        ungated = made(kda, config.replace(output_gate="none"), dtype=F64).model.layers[0].self_attn
        ungated.load_state_dict({name: y for name, y in layer.state_dict().items() if not name.startswith("g_")})
        plain = ungated(x, operator)[0]
        layer.g_b_proj.weight.zero_()
        close(layer(x, operator)[0], 0.5 * plain)
        swish = made(kda, config.replace(output_gate="swish"), dtype=F64).model.layers[0].self_attn
        swish.load_state_dict(layer.state_dict())
        close(swish(x, operator)[0], 0 * plain)
        o, gate = torch.randn(2, 3, 4, 8, dtype=F64)
        close(swish.o_norm(o, gate), silu(gate) * ungated.o_norm(o))


def operators_are_exchangeable(kda: Any) -> None:
    """By name, as a function and by path; the reference behind the same seam gives the same model."""
    tokens, config = random_tokens(2, 9), kda.preset("tiny")
    model = made(kda, config, dtype=F64)
    calls = []

    def foreign(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return kda.find_operator("torch", torch.device("cpu")).many(*args, **options)

    with torch.no_grad():
        expected = model(tokens)
        for operator in ("reference", "kda_reference.chunkwise:chunkwise_kda", foreign):
            model.operator = operator
            close(model(tokens), expected)
            cache = model.new_cache(2)
            close(torch.cat([model(tokens[:, t : t + 1], cache=cache) for t in range(9)], 1), expected)
    assert calls
    assert all(options["use_gate_in_kernel"] and options["use_beta_sigmoid_in_kernel"] for options in calls)


def forks_and_marks_keep_what_they_had(kda: Any) -> None:
    """Forks share pages until one writes; a mark leads back; a file holds the cache bit for bit; memory is given back."""
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(2, 16)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(2, page_len=4)
        model(tokens[:, :6], cache=cache)
        fork, turned = cache.fork(), cache.fork([1, 1, 0])
        assert fork.tables == cache.tables
        mark = cache.mark()
        close(model(tokens[:, 6:9], cache=cache), whole[:, 6:9])
        model((tokens[:, 6:13] + 1) % 64, cache=fork)
        close(model(tokens[:, 9:10], cache=cache), whole[:, 9:10])
        close(model(tokens[[1, 1, 0], 6:7], cache=turned), whole[[1, 1, 0], 6:7])
        later = cache.mark()
        cache.trim(mark)
        assert cache.lengths == [6, 6] == cache.device_lengths.tolist()
        close(model(tokens[:, 6:16], cache=cache), whole[:, 6:16])
        cache.trim(mark)
        for dead in (later, fork.mark()):
            with pytest.raises(DomainError, match="live mark"):
                cache.trim(dead)
        with tempfile.TemporaryDirectory() as folder:
            turned.save(Path(folder) / "cache.safetensors")
            resumed = kda.Cache.load(Path(folder) / "cache.safetensors", model.config)
        assert resumed.lengths == turned.lengths == [7, 7, 7]
        following = tokens[[1, 1, 0], 7:8]
        assert torch.equal(model(following, cache=resumed), model(following, cache=turned))
        used = sum(users > 0 for users in cache.pages.users)
        del fork
        assert sum(users > 0 for users in cache.pages.users) < used
        cache.reset()
        turned.reset()
        assert not any(cache.pages.users)


def failed_calls_leave_the_cache_as_it_was(kda: Any) -> None:
    model, tokens = made(kda, kda.preset("tiny"), dtype=F64), random_tokens(2, 8)

    def fails(*_args: Any, **_options: Any) -> Any:
        message = "no"
        raise RuntimeError(message)

    with torch.no_grad():
        cache = model.new_cache(2, page_len=4)
        model(tokens[:, :4], cache=cache)
        working = model.model.layers[3].self_attn.forward
        model.model.layers[3].self_attn.forward = fails
        with pytest.raises(RuntimeError, match="no"):
            model((tokens[:, 4:] + 1) % 64, cache=cache)
        model.model.layers[3].self_attn.forward = working
        close(model(tokens[:, 4:], cache=cache), model(tokens)[:, 4:])


def generated_tokens_are_those_of_the_whole_model(kda: Any) -> None:
    """Greedy, each sequence as if alone; stopped by a token; streamed in order; the given cache holds the prompts."""
    model = made(kda, kda.preset("tiny"))
    prompts = [random_tokens(n, seed=n).tolist() for n in (5, 1, 8)]
    streamed: list[tuple[int, int]] = []
    cache = model.new_cache(3)
    found = kda.generate.generate(
        model,
        prompts,
        max_new_tokens=6,
        prefill_chunk=3,
        cache=cache,
        on_token=lambda row, token: streamed.append((row, token)),
    )
    assert cache.lengths == [5, 1, 8]
    for row, (prompt, new) in enumerate(zip(prompts, found, strict=True)):
        assert [token for place, token in streamed if place == row] == new
        assert len(new) == 6
        text = torch.tensor([prompt + new])
        with torch.no_grad():
            expected = model(text)[0].argmax(-1)[len(prompt) - 1 : -1]
        assert expected.tolist() == new
    again = kda.generate.generate(model, prompts, max_new_tokens=6, stop={found[1][2]})
    assert again[1] == found[1][: found[1].index(found[1][2]) + 1]
    for row in (0, 2):
        cut = next((i + 1 for i, token in enumerate(found[row]) if token == found[1][2]), 6)
        assert again[row] == found[row][:cut]


def drawn_tokens_do_not_depend_on_neighbours(kda: Any) -> None:
    model = made(kda, kda.preset("tiny"))
    prompts = [random_tokens(n, seed=n).tolist() for n in (5, 1, 8)]
    sampling = kda.sampling.Sampling(temperature=1.5, top_p=0.9, seed=4)
    together = kda.generate.generate(model, prompts, max_new_tokens=6, sampling=sampling)
    for row, prompt in enumerate(prompts):
        own = kda.sampling.Sampling(temperature=1.5, top_p=0.9, seed=4 + row)
        assert kda.generate.generate(model, [prompt], max_new_tokens=6, sampling=own) == [together[row]]
    cold = kda.sampling.Sampling(temperature=1e-6)
    greedy = kda.generate.generate(model, prompts, max_new_tokens=6)
    assert kda.generate.generate(model, prompts, max_new_tokens=6, sampling=cold) == greedy


def draws_follow_the_probabilities_of_the_nucleus(kda: Any) -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.05, 0.2]], dtype=F64).log()
    sampler = kda.sampling.Sampler(kda.sampling.Sampling(temperature=1.0, top_p=0.69, seed=0), 1)
    drawn = torch.tensor([sampler.draw(logits, [0])[0] for _ in range(4000)])
    share = torch.bincount(drawn, minlength=5) / 4000
    torch.testing.assert_close(share, torch.tensor([0, 5 / 7, 0, 0, 2 / 7]), rtol=0, atol=0.03)
    narrow = kda.sampling.Sampler(kda.sampling.Sampling(temperature=1.0, top_p=1e-9), 1)
    assert {narrow.draw(logits, [0])[0] for _ in range(20)} == {1}


LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        matches_reference,
        matches_reference_with_grouped_values,
        chooses_the_experts_of_the_reference,
        prefill_then_decode_is_the_whole,
        prefill_in_chunks_is_prefill,
        one_token_of_one_sequence_decodes,
        packed_sequences_are_separate_sequences,
        rows_of_a_batch_are_independent,
        later_tokens_change_nothing_before_them,
        decode_rows_do_not_see_each_other,
        layer_kinds_follow_the_released_lists,
        full_attention_knows_no_positions,
        routing_weighs_by_scores_and_chooses_by_bias,
        experts_compute_alike_one_by_one_gathered_and_grouped,
        biases_move_towards_an_even_load,
        recomputation_changes_no_gradient,
        loss_ignores_places_without_target,
        checkpoints_come_back_bit_for_bit,
        released_names_are_stored,
        gates_start_as_the_report_has_them,
        one_decay_per_head_is_the_same_decay_in_every_channel,
        decay_without_the_delta_rule_erases_nothing,
        switches_change_what_they_name,
        operators_are_exchangeable,
        forks_and_marks_keep_what_they_had,
        failed_calls_leave_the_cache_as_it_was,
        generated_tokens_are_those_of_the_whole_model,
        drawn_tokens_do_not_depend_on_neighbours,
        draws_follow_the_probabilities_of_the_nucleus,
    )
}
