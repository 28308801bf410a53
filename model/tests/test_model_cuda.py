"""On a GPU: graphs of decoding and training repeat the steps, the grouped product is the loop, bfloat16 loses what it loses on torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from model_cases import made, package, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def model() -> Any:
    """Return a model of widths that tensor cores take, on the GPU, in bfloat16, on the Triton kernels."""
    kda = package()
    config = kda.preset("tiny").replace(
        hidden_size=128,
        kda_head_width=64,
        latent_rank=64,
        key_width=32,
        shared_key_width=32,
        value_width=32,
        expert_width=64,
    )
    found = made(kda, config, operator="triton")
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.div_(3)
    return found.cast(torch.bfloat16).cuda()


def test_replayed_steps_are_the_steps_of_the_model(model: Any) -> None:
    """Bit for bit over a page's end, lengths differing by row, and with a second graph on what the first has left."""
    kda = package()
    prompts = [random_tokens(n, seed=n).tolist() for n in (60, 5, 130)]
    with torch.no_grad():
        cache = model.new_cache(3)
        logits = kda.generate.prefill(model, prompts, cache)
        other = cache.fork()
        for capacity in (7, 3):
            graph = kda.decode_graph.DecodeGraph(model, cache, capacity)
            other.reserve(capacity)  # as wide a table, so that sums have one order
            for _ in range(capacity):
                tokens = logits.argmax(-1)
                expected = model(tokens[:, None], cache=other)[:, 0]
                logits = graph.step(tokens).clone()
                assert torch.equal(logits, expected)
                assert cache.lengths == other.lengths == cache.device_lengths.tolist()
            with pytest.raises(ValueError, match="capacity"):
                graph.step(tokens)


def test_generation_with_a_graph_is_generation(model: Any) -> None:
    kda = package()
    model.cast(torch.float32)  # in which no two tokens are tied
    prompts = [random_tokens(n, seed=n).tolist() for n in (60, 5, 130)]
    plain = kda.generate.generate(model, prompts, max_new_tokens=20)
    assert kda.generate.generate(model, prompts, max_new_tokens=20, graph=True) == plain
    stop = {plain[1][4]}
    assert kda.generate.generate(model, prompts, max_new_tokens=20, graph=True, stop=stop) == kda.generate.generate(
        model, prompts, max_new_tokens=20, stop=stop
    )


def test_grouped_product_is_the_loop_over_experts(model: Any) -> None:
    """Forward and backward; both round to bfloat16, so they agree to some of its units."""
    experts = next(module for module in model.modules() if type(module).__name__ == "Experts")
    generator = torch.Generator("cuda").manual_seed(0)
    chosen = torch.randint(0, 7, (300,), generator=generator, device="cuda").sort().values
    x = torch.randn(300, 128, generator=generator, device="cuda").bfloat16().requires_grad_()
    upstream = torch.randn(300, 128, generator=generator, device="cuda").bfloat16()
    results = []
    for form in (experts._one_by_one, experts._grouped):
        y = form(x, chosen)
        results.append([y, *torch.autograd.grad((y * upstream).sum(), [x, *experts.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert bool(found.isfinite().all())
        assert float((found - expected).detach().float().norm()) <= 2.0**-6 * float(expected.detach().float().norm())


def test_the_kernels_round_no_more_than_torch(model: Any) -> None:
    """In bfloat16, logits and every gradient are as near to float32 as on the torch form, with the same experts."""
    kda = package()
    tokens = random_tokens(2, 150).cuda()
    plain = kda.KimiLinear(model.config, "torch").cuda().eval()
    plain.load_state_dict(model.state_dict())
    rounded = kda.KimiLinear(model.config, "torch").cuda().eval().cast(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    for router in model.routers():
        router.forced = None
    with torch.no_grad():
        model(tokens)
    routing = [router.last.indices for router in model.routers()]
    results = []
    for one in (model, rounded, plain):
        for router, indices in zip(one.routers(), routing, strict=True):
            router.forced = indices
        one.zero_grad()
        out = one(tokens)
        out.float().square().mean().backward()
        gradients = {name: parameter.grad.float() for name, parameter in one.named_parameters()}
        results.append({"logits": out.detach().float(), **gradients})
    for name, expected in results[-1].items():
        found, other = (
            float((result[name] - expected).norm() / expected.norm().clamp_min(1e-20)) for result in results[:-1]
        )
        # Of two errors of n elements that are alike in size, one is by chance larger: the more, the fewer elements.
        assert found < (1.5 + 4 / expected.numel() ** 0.5) * other + 2.0**-8, (name, found, other)


def test_prefill_in_chunks_is_prefill(model: Any) -> None:
    """In float32, where the attention over earlier tokens takes another kernel than that of a whole text."""
    kda = package()
    model.cast(torch.float32)
    prompts = [random_tokens(n, seed=n).tolist() for n in (300, 5, 130)]
    with torch.no_grad():
        whole = torch.stack([model(torch.tensor([prompt], device="cuda"))[0, -1] for prompt in prompts])
        for chunk in (48, 128):
            found = kda.generate.prefill(model, prompts, model.new_cache(3), chunk)
            assert float((found - whole).norm() / whole.norm()) < 1e-4


def training_run(folder: Path, mixer: str = "kda", *, graph: bool, **changes: Any) -> Any:
    """Return a run whose steps can be recorded, unless changes say otherwise."""
    training = package().training
    # As many tokens as take the embedding's gradient by sorting, as longer sequences do.
    settings = {"data": "stacks", "length": 80, "rows": 64, "steps": 30, "warmup": 5, "precision": "bfloat16"}
    recipe = training.recipe.Recipe(mixer=mixer, **(settings | changes))
    return training.run.Run(recipe, folder, "cuda", graph=graph)


def said(run: Any) -> list[dict[str, Any]]:
    """Return the rows of a run without its clock."""
    rows = [json.loads(line) for line in (run.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_alike(found: Any, expected: Any) -> None:
    """Refuse a run that says anything else than another, or ends elsewhere."""
    assert said(found) == said(expected)
    for (name, own), (_, other) in zip(
        found.model.state_dict().items(), expected.model.state_dict().items(), strict=True
    ):
        assert torch.equal(own, other), name


@pytest.mark.parametrize("mixer", ["kda", "gdn", "decay"])
def test_replayed_training_steps_are_the_steps(mixer: str, tmp_path: Path) -> None:
    """Losses, accuracies, norms and parameters bit for bit, also when the run is taken up again."""
    launched = training_run(tmp_path / "launched", mixer, graph=False)
    launched.train(log_every=1)
    replayed = training_run(tmp_path / "replayed", mixer, graph=True)
    assert replayed.obstacle is None
    replayed.train(save_every=10, log_every=1, until=20)
    assert replayed.recorded
    resumed = training_run(tmp_path / "replayed", mixer, graph=True)
    assert resumed.step == 20
    resumed.train(log_every=1)
    assert resumed.recorded
    assert_alike(resumed, launched)


def test_runs_side_by_side_are_the_runs_alone(tmp_path: Path) -> None:
    """Each on a stream of its own, with the same sequences, two at a time of three."""
    training = package().training
    mixers = ("kda", "gdn", "decay")
    alone = [training_run(tmp_path / f"{mixer}-alone", mixer, graph=True) for mixer in mixers]
    for run in alone:
        run.train(log_every=5)
    runs = (training_run(tmp_path / mixer, mixer, graph=True) for mixer in mixers)
    found = list(training.side_by_side.train_side_by_side(runs, 2, training.run.Pace(500, 5)))
    assert [error for _, error in found] == [None] * 3
    for mixer, expected in zip(mixers, alone, strict=True):
        assert_alike(next(run for run, _ in found if run.recipe.mixer == mixer), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optimiser": "muon"}, "learning rate is read on the host"),
        ({"model": "tiny"}, "how many tokens each expert has"),
        ({"recompute": True}, "random numbers"),
    ],
)
def test_steps_that_cannot_be_recorded_are_launched(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"operator": "torch", "precision": "float32", "steps": 6}
    run = training_run(tmp_path, graph=True, **(settings | changes))
    assert reason in run.obstacle
    run.train(log_every=1)
    assert not run.recorded
    assert run.ended == "steps"
