"""The model obeys its laws (``model_laws``), and is in the budget of the float64 reference on every operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_budget import judge, score
from model_cases import evaluate, made, package, truth
from model_laws import LAWS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put the operator of ``--impl`` in place of our own: the model is a test of an operator."""
    if "operator" in metafunc.fixturenames:
        given = metafunc.config.getoption("kda_impl")
        metafunc.parametrize("operator", ["torch", "triton", "reference"] if given is None else [given])


@pytest.mark.parametrize("law", LAWS)
def test_model_obeys(law: str) -> None:
    LAWS[law](package())


def test_decoding_is_in_budget_on(operator: str) -> None:
    """Token by token, unforced: the recurrent kernel and the absorbed attention, in float32."""
    kda, (expected, tokens) = package(), truth("tiny")
    device = "cuda" if operator not in ("torch", "reference") and torch.cuda.is_available() else "cpu"
    model = made(kda, kda.preset("tiny"), operator=operator).to(device)
    with torch.no_grad():
        cache = model.new_cache(2, page_len=8)
        steps = [model(tokens[:, t : t + 1].to(device), cache=cache) for t in range(tokens.shape[1])]
    assert score(torch.cat(steps, 1).cpu(), expected.budgets["logits"]) <= 1


@pytest.mark.parametrize("preset", ["tiny", "tiny-grouped-values"])
def test_model_is_in_budget_on(operator: str, preset: str, record_property: Any) -> None:
    kda, (expected, tokens) = package(), truth(preset)
    device = "cuda" if operator not in ("torch", "reference") and torch.cuda.is_available() else "cpu"
    model = made(kda, kda.preset(preset), operator=operator).to(device)
    forced = {layer: indices.to(device) for layer, indices in expected.routing.items()}
    found = {name: x.cpu() for name, x in evaluate(kda, model, tokens.to(device), forced).items()}
    verdict = judge(found, expected)
    record_property("score", verdict.score)
    record_property("tie_margin", expected.margin)
    assert verdict.score <= 1, verdict
