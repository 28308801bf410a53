"""The model obeys its laws (``model_laws``), and is in the budget of the float64 reference on every operator."""

from __future__ import annotations

from dataclasses import replace
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


@pytest.mark.parametrize("mixer", ["kda", "gdn", "decay"])
def test_mixers_in_bfloat16_err_on_kernels_as_on_torch(mixer: str) -> None:
    """Output and gradients, against float64: at most twice the error of the same bfloat16 layer whose operator is float32 torch.

    The convolution in front is torch's in all of them.
    The decay baseline hands the operator values 2^30 times as large, which no format in between may clip.
    """
    kda = package()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = kda.preset("tiny-dense").replace(mixer=mixer, kda_head_width=16)
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    upstream = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1))

    def layer(operator: str, dtype: torch.dtype, where: str) -> list[torch.Tensor]:
        model = made(kda, config).cast(torch.bfloat16).to(where)
        own = (model if dtype == torch.bfloat16 else model.to(dtype)).model.layers[1].self_attn
        entry = x.to(where, dtype).requires_grad_()
        out = own(entry, replace(kda.find_operator(operator, entry.device), convolution=None))[0]
        (out * upstream.to(where, dtype)).sum().backward()
        return [y.double().cpu() for y in (out.detach(), entry.grad, *(p.grad for p in own.parameters()))]

    exact = layer("reference", torch.float64, "cpu")
    found, baseline = layer("triton", torch.bfloat16, device), layer("torch", torch.bfloat16, "cpu")
    for place, (value, own, other) in enumerate(zip(exact, found, baseline, strict=True)):
        assert (own - value).norm() <= 2 * (other - value).norm(), place


@pytest.mark.parametrize("length", [2, 70])
def test_convolution_of_the_kernels_is_torchs(length: int) -> None:
    """Output and gradients of a layer in float32, to some of its units, for rows shorter than the filter too."""
    kda = package()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = made(kda, kda.preset("tiny-dense").replace(kda_head_width=16)).to(device).model.layers[1].self_attn
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(2, length, 32, generator=generator).to(device) for _ in range(2))
    operator = kda.find_operator("triton", x.device)
    results = []
    for one in (operator, replace(operator, convolution=None)):
        entry = x.clone().requires_grad_()
        out = own(entry, one)[0]
        results.append([out, *torch.autograd.grad(out, [entry, *own.parameters()], upstream)])
    for place, (found, expected) in enumerate(zip(*results, strict=True)):
        assert float((found - expected).detach().norm()) <= 1e-5 * float(expected.detach().norm()), place
