"""The hybrid model: its parts in order, causal, without positions, with a gradient."""

from __future__ import annotations

import pytest
import torch
from kda_reference.hybrid import float64_leaves, hybrid_model, next_token_loss
from model_tensors import CONFIG, model_tensors

TOKENS = torch.randint(0, 23, (2, 7), generator=torch.Generator().manual_seed(0))


def test_later_tokens_change_nothing_before_them() -> None:
    tensors, changed = model_tensors(), TOKENS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 23
    before, after = hybrid_model(CONFIG, tensors, TOKENS), hybrid_model(CONFIG, tensors, changed)
    torch.testing.assert_close(before.logits[:, :5], after.logits[:, :5], rtol=0, atol=1e-13)
    assert not torch.allclose(before.logits[:, 5:], after.logits[:, 5:])


def test_rows_are_independent() -> None:
    tensors = model_tensors()
    together = hybrid_model(CONFIG, tensors, TOKENS).logits
    for row in range(2):
        alone = hybrid_model(CONFIG, tensors, TOKENS[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-13)


def test_layers_are_of_the_kind_that_the_configuration_lists_from_one() -> None:
    tensors = model_tensors()
    result = hybrid_model(CONFIG, tensors, TOKENS)
    assert sorted(result.routing) == [1, 2, 3]
    assert len(result.hidden) == 5
    shifted = {**CONFIG, "linear_attn_config": {**CONFIG["linear_attn_config"], "full_attn_layers": [3]}}
    with pytest.raises(KeyError, match="kv_a_layernorm"):
        hybrid_model(shifted, tensors, TOKENS)


def test_forcing_the_chosen_experts_changes_nothing_and_others_something() -> None:
    tensors = model_tensors()
    free = hybrid_model(CONFIG, tensors, TOKENS)
    chosen = {layer: routing.indices for layer, routing in free.routing.items()}
    assert torch.equal(hybrid_model(CONFIG, tensors, TOKENS, forced=chosen).logits, free.logits)
    others = {layer: (indices + 1) % 6 for layer, indices in chosen.items()}
    assert not torch.allclose(hybrid_model(CONFIG, tensors, TOKENS, forced=others).logits, free.logits)


def test_gradient_of_every_parameter_is_the_slope_of_the_loss() -> None:
    leaves = float64_leaves(model_tensors())
    free = hybrid_model(CONFIG, leaves, TOKENS)
    forced = {layer: routing.indices for layer, routing in free.routing.items()}
    names = [name for name in leaves if "bias" not in name or "dt_bias" in name]
    found = torch.autograd.grad(
        next_token_loss(free.logits, TOKENS), [leaves[name] for name in names], materialize_grads=True
    )
    step, generator = 1e-6, torch.Generator().manual_seed(1)
    for name, gradient in zip(names, found, strict=True):
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        sides = []
        for sign in (1, -1):
            moved = {key: x.detach() for key, x in leaves.items()}
            moved[name] = moved[name] + sign * step * direction
            sides.append(next_token_loss(hybrid_model(CONFIG, moved, TOKENS, forced=forced).logits, TOKENS))
        slope = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-5, atol=1e-8)


def test_tied_embeddings_are_the_head() -> None:
    tensors = model_tensors()
    del tensors["lm_head.weight"]
    tied = hybrid_model({**CONFIG, "tie_word_embeddings": True}, tensors, TOKENS).logits
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert torch.equal(tied, hybrid_model(CONFIG, tensors, TOKENS).logits)


def test_loss_of_equal_logits_is_the_logarithm_of_the_vocabulary() -> None:
    loss = next_token_loss(torch.zeros(2, 7, 23, dtype=torch.float64), TOKENS)
    torch.testing.assert_close(loss, torch.tensor(23.0, dtype=torch.float64).log())
