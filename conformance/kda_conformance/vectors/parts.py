"""Vectors of what surrounds the operator: convolution with state, MLA decoding, expert routing.

Results are evaluated with 50 digits on the published numbers and rounded once, so their bound is half a unit in the last place.
What an arithmetic may err comes from an ensemble of correct computations, as the operator's does: members round operands and stored
values stochastically and accumulate in float32, and ten of their deviations are permitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import mpmath  # type: ignore[import-untyped]
import numpy as np
import torch

from kda_conformance.arithmetic import CLASSES, U32, U64
from kda_conformance.judge import Z_LIMIT
from kda_conformance.regimes import Draw
from kda_conformance.rounding import Rounder
from kda_conformance.vectors.vector import CLASS_NAMES, Vector, narrow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from kda_conformance.arithmetic import Arithmetic

    Exact = NDArray[np.object_]
    Inputs = dict[str, Tensor]

DIGITS, MEMBERS, SEED = 50, 16, 500
UNDERFLOW = 1e-300


class Part(NamedTuple):
    """One drawn call: its comment, flags, inputs and options."""

    comment: str
    flags: list[str]
    inputs: Inputs
    options: dict[str, Any]


def convolutions() -> Iterator[Part]:
    """Draw calls of the depthwise causal convolution that continue earlier ones."""
    for place, (batch, tokens, channels, taps, has_tail) in enumerate(
        (b, t, d, w, s) for s in (True, False) for b, d in ((1, 6), (2, 5)) for w in (4, 2) for t in (0, 1, 2, 3, 9)
    ):
        draw = Draw(20_000 + place)
        inputs = {"x": narrow(draw.normal((batch, tokens, channels))), "weight": narrow(draw.normal((channels, taps)))}
        if has_tail:
            inputs["tail"] = narrow(draw.normal((batch, taps - 1, channels)))
        flags = ["ConvolutionTail"] * has_tail + ["ShortCall"] * (tokens < taps - 1) + ["Batch"] * (batch > 1)
        comment = f"{taps} taps over {tokens} tokens of {channels} channels"
        yield Part(comment, flags or ["KnownAnswer"], inputs, {})


def convolution_exact(x: dict[str, Exact], options: dict[str, Any]) -> dict[str, Exact]:
    """Return ``y_t = sum_j w_j x_(t - W + 1 + j)`` and the last W - 1 inputs."""
    del options
    taps = x["weight"].shape[1]
    tail = x.get("tail", np.full((x["x"].shape[0], taps - 1, x["x"].shape[2]), mpmath.mpf(0), dtype=object))
    known = np.concatenate([tail, x["x"]], 1)
    tokens = x["x"].shape[1]
    y = x["x"] * 0
    for j in range(taps):
        y = y + x["weight"][:, j] * known[:, j : j + tokens]
    return {"y": y, "tail_out": known[:, tokens:]}


def convolution_member(x: Inputs, options: dict[str, Any], r: Rounder, arithmetic: Arithmetic) -> Inputs:
    """Return a member's results: products accumulated in float32."""
    del options, arithmetic
    taps, tokens = x["weight"].shape[2], x["x"].shape[2]
    known = torch.cat([x["tail"], x["x"]], 2) if "tail" in x else torch.nn.functional.pad(x["x"], (0, 0, taps - 1, 0))
    terms = torch.stack([x["weight"][:, None, None, :, j] * known[:, :, j : j + tokens] for j in range(taps)])
    return {"y": r.accumulate(terms.sum(0), terms.square().sum(0), taps), "tail_out": known[:, :, tokens:]}


def decodings() -> Iterator[Part]:
    """Draw one new token that attends over cached latents; every third call has a sharp softmax."""
    for place, (heads, length, rank) in enumerate(
        (h, n, r) for h in (1, 2, 4) for n in (1, 2, 5, 16, 33) for r in (6, 12)
    ):
        draw, (own, shared, values) = Draw(30_000 + place), (4, 3, 5)
        sharp = place % 3 == 2  # noqa: PLR2004 - every third
        inputs = {
            "q": narrow(draw.normal((heads, own + shared)) * (12 if sharp else 1)),
            "latents": narrow(draw.normal((length, rank + shared))),
            "up": narrow(draw.normal((heads, own + values, rank)) * rank**-0.5),
        }
        options = {"key_width": own, "shared_key_width": shared, "value_width": values, "scale": (own + shared) ** -0.5}
        flags = ["AbsorbedForm", "SharedKey"] + ["SharpAttention"] * sharp + ["OneToken"] * (length == 1)
        yield Part(f"{heads} heads over {length} latents of rank {rank}", flags, inputs, options)


def decoding_exact(x: dict[str, Exact], options: dict[str, Any]) -> dict[str, Exact]:
    """Return ``softmax(scale q k^T) v`` with keys and values expanded from the latents."""
    own, shared, exp = options["key_width"], options["shared_key_width"], np.frompyfunc(mpmath.exp, 1, 1)
    c, s = x["latents"][:, :-shared], x["latents"][:, -shared:]
    rows = []
    for q, up in zip(x["q"], x["up"], strict=True):
        logits = mpmath.mpf(options["scale"]) * (c @ up[:own].T @ q[:own] + s @ q[own:])
        weights = exp(logits - max(logits))
        rows.append(weights @ (c @ up[own:].T) / weights.sum())
    return {"o": np.stack(rows)}


def decoding_member(x: Inputs, options: dict[str, Any], r: Rounder, arithmetic: Arithmetic) -> Inputs:
    """Return a member's results: expanded and absorbed form in turn, softmax in float32."""
    own, shared, storage, operand = (
        options["key_width"],
        options["shared_key_width"],
        arithmetic.storage,
        arithmetic.operand,
    )
    c, s = x["latents"][:, None, :, :-shared], x["latents"][:, None, :, -shared:]
    q, up_k, up_v = x["q"][:, :, None, :], x["up"][:, :, :own], x["up"][:, :, own:]
    if r.first_seed % 2:
        k, v = (r.raw(r.matmul(c, up.transpose(-1, -2), operand), storage) for up in (up_k, up_v))
        logits = r.matmul(q[..., :own], k.transpose(-1, -2), operand)
    else:
        absorbed = r.raw(r.matmul(q[..., :own], up_k, operand), storage)
        logits = r.matmul(absorbed, c.transpose(-1, -2), operand)
    logits = r.raw(logits + r.matmul(q[..., own:], s.transpose(-1, -2), operand), "fp32")
    logits = r.raw(options["scale"] * logits, "fp32")
    weights = r.raw((logits - logits.amax(-1, keepdim=True)).exp(), "fp32")
    total = r.accumulate(weights.sum(-1, keepdim=True), weights.square().sum(-1, keepdim=True), weights.shape[-1])
    if r.first_seed % 2:
        return {"o": r.raw(r.matmul(weights, v, operand) / total, "fp32")[:, :, 0]}
    mean = r.raw(r.matmul(weights, c.expand(-1, weights.shape[1], -1, -1), operand) / total, storage)
    return {"o": r.matmul(mean, up_v.transpose(-1, -2), operand)[:, :, 0]}


def routings() -> Iterator[Part]:
    """Draw router calls whose choices are clear: scores and biases from spaced values."""
    for place, (experts, chosen, grouping, renormalise) in enumerate(
        (e, k, g, n)
        for e, k in ((8, 2), (16, 4), (12, 3), (16, 8))
        for g in ((1, 1), (4, 2))
        for n in (True, False)
        for _ in range(2)
    ):
        draw, tokens = Draw(40_000 + place), 3
        # Scores a quarter of their spacing apart at least, so that a format of eight bits chooses alike.
        order = torch.stack([torch.randperm(experts, generator=draw.generator) for _ in range(tokens)])
        logits = (order.double() - experts / 2) * 0.25 + 0.03 * draw.uniform((tokens, experts))
        bias = 0.02 * (draw.uniform((experts,)) - 0.5)
        groups, chosen_groups = grouping
        inputs = {"logits": narrow(logits).float(), "bias": narrow(bias).float()}
        options = {
            "num_chosen": chosen,
            "factor": 2.446,
            "renormalise": renormalise,
            "num_groups": groups,
            "num_chosen_groups": chosen_groups,
        }
        flags = ["CorrectionBias"] + ["ExpertGroups"] * (groups > 1) + ["NotRenormalised"] * (not renormalise)
        yield Part(f"{chosen} of {experts} experts", flags, inputs, options)


def routing_exact(x: dict[str, Exact], options: dict[str, Any]) -> dict[str, Exact]:
    """Return the chosen experts, best first, and their weights."""
    exp = np.frompyfunc(mpmath.exp, 1, 1)
    scores = 1 / (1 + exp(-x["logits"]))
    indices, weights = [], []
    for score in scores:
        choice = score + x["bias"]
        groups = choice.reshape(options["num_groups"], -1)
        if options["num_groups"] > 1:
            best = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[
                : options["num_chosen_groups"]
            ]
            allowed = [e for e in range(len(choice)) if e // groups.shape[1] in best]
        else:
            allowed = list(range(len(choice)))
        picked = sorted(allowed, key=lambda e: -choice[e])[: options["num_chosen"]]
        weight = score[picked]
        if options["renormalise"]:
            weight = weight / (weight.sum() + mpmath.mpf("1e-20"))
        indices.append(picked)
        weights.append(mpmath.mpf(options["factor"]) * weight)
    return {"indices": np.array(indices, dtype=object), "weights": np.stack(weights)}


def routing_member(x: Inputs, options: dict[str, Any], r: Rounder, arithmetic: Arithmetic) -> Inputs:
    """Return a member's results: float32 throughout, whatever the arithmetic of the rest."""
    del arithmetic
    scores = r.raw(torch.sigmoid(x["logits"]), "fp32")
    weights = scores.gather(-1, x["indices"].long())
    if options["renormalise"]:
        total = r.accumulate(weights.sum(-1, keepdim=True), weights.square().sum(-1, keepdim=True), weights.shape[-1])
        weights = r.raw(weights / (total + 1e-20), "fp32")
    return {"weights": r.raw(options["factor"] * weights, "fp32"), "indices": x["indices"]}


PARTS: dict[str, tuple[Callable[[], Iterator[Part]], Callable[..., dict[str, Exact]], Callable[..., Inputs]]] = {
    "convolution": (convolutions, convolution_exact, convolution_member),
    "latent-attention": (decodings, decoding_exact, decoding_member),
    "routing": (routings, routing_exact, routing_member),
}


def vectors_of_part(group: str) -> Iterator[Vector]:
    """Make the vectors of one of the parts around the operator."""
    draws, evaluate, member = PARTS[group]
    for number, part in enumerate(draws()):
        with mpmath.workdps(DIGITS):
            number_of = np.frompyfunc(mpmath.mpf, 1, 1)
            exact = {name: number_of(x.double().numpy().astype(object)) for name, x in part.inputs.items()}
            found = evaluate(exact, part.options)
            value = {name: torch.from_numpy(np.asarray(x).astype(np.float64)) for name, x in found.items()}
        bound = {name: U64 * x.abs() + UNDERFLOW for name, x in value.items()}
        permitted = {name: _permitted(part, value, bound, member, CLASSES[name]) for name in CLASS_NAMES}
        yield Vector(
            id=f"{group}-{number:03d}",
            comment=part.comment,
            flags=part.flags,
            inputs=part.inputs,
            options=part.options,
            value=value,
            bound=bound,
            permitted=permitted,
        )


def _permitted(
    part: Part, value: Inputs, bound: Inputs, member: Callable[..., Inputs], arithmetic: Arithmetic
) -> Inputs:
    """Return ten deviations of an ensemble in one arithmetic, each mean square shrunk half way to that of all elements."""
    half = MEMBERS // 2
    unit = U64 / U32 if arithmetic.name == "fp64" else 1.0
    leaves = {name: x.double()[None].expand(half, *x.shape) for name, x in (part.inputs | value).items()}
    squares = {name: torch.zeros_like(x) for name, x in value.items()}
    for seed in (SEED, SEED + 1):
        rounder = Rounder(seed, half, torch.device("cpu"))
        for name, x in member(leaves, part.options, rounder, arithmetic).items():
            squares[name] += (x - value[name]).square().sum(0) / MEMBERS
    found = {}
    for name, square in squares.items():
        pooled = 0.5 * (square + square.mean()) if square.numel() else square
        found[name] = Z_LIMIT * (unit**2 * pooled + bound[name].square()).sqrt()
    return found
