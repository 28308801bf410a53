"""Training learns, is the same after a kill, and its data, optimisers and tables are what they say."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kda_model import KimiLinear, checkpoint, initialise, preset
from kda_model.cache_table import cache_bytes, cache_rows
from kda_model.synthetic import Cell, summary
from kda_model.throughput import measure
from kda_model.training.optimiser import Optimiser
from kda_model.training.recipe import Recipe
from kda_model.training.run import ROWS, Pace, Run
from kda_model.training.side_by_side import train_side_by_side
from kda_model.training.step import loss_and_accuracy
from kda_model.training.tasks import TASKS, SyntheticTask
from kda_model.training.text import BEGIN, END, ByteText, read_documents
from kda_reference.errors import DomainError

CPU = torch.device("cpu")
RECALL = Recipe(
    data="recall",
    length=16,
    rows=64,
    model="tiny-dense",
    steps=150,
    learning_rate=1e-2,
    warmup=10,
    weight_decay=0.0,
    operator="torch",
)


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]


def test_recall_is_learned(tmp_path: Path) -> None:
    """In 150 steps, from the loss of chance, log 64 = 4.16, to less than 0.1."""
    cell = Cell("recall", 16, "kda", 1e-2, 0)
    tmp_path, out = cell.folder(tmp_path), tmp_path
    accuracy = Run(RECALL, tmp_path).train(log_every=1)
    rows = rows_of(tmp_path)
    assert rows[0]["kind"] == "run"
    assert float(str(rows[1]["loss"])) > 4
    assert float(str(rows[-1]["loss"])) < 0.1
    assert accuracy > 0.99
    assert [row.get("ended") for row in rows] == [None] * 150 + ["steps"]
    found = summary(cell, out)
    assert found["steps"] == 150
    assert 20 < found["learned_at"] < 150
    again = checkpoint.load(tmp_path, operator="torch")
    tokens = SyntheticTask("recall", 16, 64, seed=99).batch(0, CPU)
    with torch.no_grad():
        asked = tokens.targets >= 0
        right = again.eval()(tokens.tokens)[asked].argmax(-1) == tokens.targets[asked]
    assert float(right.float().mean()) > 0.97


def test_a_run_says_what_ended_it_and_nothing_where_it_was_stopped(tmp_path: Path) -> None:
    recipe = Recipe(
        data="recall", length=16, rows=2, model="tiny-dense", steps=40, warmup=2, operator="torch", stop_at=0.0
    )
    run = Run(recipe, tmp_path)
    run.train(until=15)
    assert run.ended is None
    assert all("ended" not in row for row in rows_of(tmp_path))
    run.train()
    # The accuracy asked for is that of 20 steps.
    assert [(row["step"], row.get("ended")) for row in rows_of(tmp_path)[1:]] == [
        (10, None),
        (15, None),
        (20, "accuracy"),
    ]


def test_runs_side_by_side_are_the_runs_alone(tmp_path: Path) -> None:
    """Two at a time of four, one of which diverges and stops nobody else; a run that had ended is not run again."""
    changes: dict[str, dict[str, object]] = {
        "one": {}, "other": {"mixer": "gdn", "steps": 7}, "wild": {"learning_rate": 1e30, "warmup": 0}, "done": {"steps": 3},
    }  # fmt: skip
    recipes = {name: Recipe(**{**RECALL.to_row(), "steps": 12, "rows": 4, **some}) for name, some in changes.items()}
    for name in ("one", "other"):
        Run(recipes[name], tmp_path / f"{name}-alone").train(log_every=4)
    Run(recipes["done"], tmp_path / "done").train(log_every=4)
    runs = (Run(recipe, tmp_path / name) for name, recipe in recipes.items())
    found = {run.folder.name: error for run, error in train_side_by_side(runs, 2, Pace(500, 4))}
    assert "loss must be finite" in str(found.pop("wild"))
    assert found == {"one": None, "other": None, "done": None}

    def said(name: str) -> list[dict[str, object]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(tmp_path / name)]

    for name in ("one", "other"):
        assert said(name) == said(f"{name}-alone")
    assert [row.get("step") for row in rows_of(tmp_path / "done")] == [None, 3]


def test_metrics_are_read_where_a_row_or_a_state_is_due(tmp_path: Path) -> None:
    """And nowhere else; rows and parameters do not depend on how often that is."""
    recipe = Recipe(**{**RECALL.to_row(), "steps": 10, "rows": 4})
    found = {}
    for log_every, save_every in ((1, 500), (4, 6)):
        run = Run(recipe, tmp_path / str(log_every))
        stretches = []
        while run.ended is None:
            run.start(Pace(save_every, log_every))
            before = run.step
            run.finish(Pace(save_every, log_every))
            stretches.append(run.step - before)
        found[log_every] = stretches
        if log_every == 4:
            assert stretches == [4, 2, 2, 2]
    rows = {row["step"]: row["loss"] for row in rows_of(tmp_path / "1")[1:]}
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path / "4")[1:]] == [
        (step, rows[step]) for step in (4, 8, 10)
    ]


def test_places_that_are_not_asked_change_neither_loss_nor_accuracy() -> None:
    model = initialise(KimiLinear(preset("tiny-dense").replace(vocab_size=130), "torch"), 0)
    drawn = SyntheticTask("stacks", 24, rows=4).batch(0, CPU)
    asked = drawn.targets >= 0
    assert 0 < int(asked.sum()) < asked.numel()
    logits = model(drawn.tokens).detach()
    # The model guesses right at about half of the places that are asked.
    known = asked & (torch.arange(drawn.targets.shape[1]) % 2 == 0)
    batch = replace(drawn, targets=torch.where(known, logits.argmax(-1), drawn.targets))
    loss, accuracy = loss_and_accuracy(model, batch)
    guesses, targets = logits[asked], batch.targets[asked]
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(guesses, targets).item(), rel=1e-6)
    assert 0 < accuracy.item() == (guesses.argmax(-1) == targets).float().mean().item() < 1


def test_a_graph_is_not_made_on_a_cpu_and_the_run_is_the_same(tmp_path: Path) -> None:
    recipe = Recipe(**{**RECALL.to_row(), "steps": 6, "rows": 4})
    for graph in (False, True):
        run = Run(recipe, tmp_path / str(graph), graph=graph)
        assert run.obstacle == "the model is on cpu"
        run.train(log_every=1)
        assert not run.recorded
    losses = [[row.get("loss") for row in rows_of(tmp_path / str(graph))] for graph in (False, True)]
    assert losses[0] == losses[1]


def test_bytes_are_learned_with_muon_experts_and_recomputation(tmp_path: Path) -> None:
    """In 30 steps, from log 258 = 5.55 to less than 0.5 on three sentences."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"the state decays and is corrected.\n\na key reads what it wrote.\n\nmemory is finite.\n")
    recipe = Recipe(
        data=str(text), length=32, rows=4, model="tiny", steps=30, learning_rate=2e-2, warmup=5, optimiser="muon",
        recompute=True, operator="torch", precision="bfloat16",
    )  # fmt: skip
    run = Run(recipe, tmp_path / "run")
    biases = [router.e_score_correction_bias.clone() for router in run.model.routers()]
    run.train(log_every=1)
    rows = rows_of(tmp_path / "run")
    assert float(str(rows[1]["loss"])) > 5
    assert float(str(rows[-1]["loss"])) < 0.5
    assert run.model.dtype == torch.bfloat16
    assert all(
        not torch.equal(before, router.e_score_correction_bias)
        for before, router in zip(biases, run.model.routers(), strict=True)
    )


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_killed_run_goes_on_as_if_nothing_had_happened(optimiser: str, tmp_path: Path) -> None:
    """Killed while it writes a row, three steps behind its last state; parameters and losses come out bit for bit."""
    recipe = Recipe(
        data="stacks",
        length=24,
        rows=4,
        model="tiny",
        steps=9,
        warmup=2,
        optimiser=optimiser,
        operator="torch",
        precision="bfloat16",
    )
    script = f"""
import os, signal
from kda_model.training.recipe import Recipe
from kda_model.training.run import Run
class Killed(Run):
    def _append(self, row):
        if row["step"] == 7:
            with (self.folder / "rows.jsonl").open("a") as file:
                file.write('{{"kind": "train", "st')
            os.kill(os.getpid(), signal.SIGKILL)
        super()._append(row)
Killed(Recipe(**{recipe.to_row()!r}), {str(tmp_path / "killed")!r}).train(save_every=4, log_every=1)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = Run(recipe, tmp_path / "killed")
    assert resumed.step == 4
    resumed.train(log_every=1)
    straight = Run(recipe, tmp_path / "straight")
    straight.train(log_every=1)
    for (name, found), (_, expected) in zip(
        resumed.model.state_dict().items(), straight.model.state_dict().items(), strict=True
    ):
        assert torch.equal(found, expected), name
    same = [[(row.get("step"), row.get("loss")) for row in rows_of(tmp_path / name)] for name in ("killed", "straight")]
    assert same[0] == same[1]
    with pytest.raises(DomainError, match="another learning_rate"):
        Run(Recipe(**{**recipe.to_row(), "learning_rate": 1.0}), tmp_path / "killed")


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_masters_keep_updates_that_sixteen_bits_would_lose(optimiser: str) -> None:
    model = initialise(KimiLinear(preset("tiny"), "torch"), 0).cast(torch.bfloat16)
    optimise = Optimiser(model, optimiser, weight_decay=0.0)
    start = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    steady = {name: torch.randn(parameter.shape, generator=generator) for name, parameter in model.named_parameters()}
    for _ in range(40):
        for name, parameter in model.named_parameters():
            parameter.grad = steady[name].to(parameter.dtype)
        optimise.step(1e-5, 1e9)
    # AdamW moves every element by about the rate; Muon a matrix by as much in the root mean square.
    for name, parameter in model.named_parameters():
        moved = (parameter.detach().float() - start[name]).square().mean().sqrt()
        masters = [x for unit in optimise.units for x in unit.masters if x.parameter is parameter]
        exact = torch.stack([x.leaf for x in masters]) if masters[0].part is not None else masters[0].leaf
        assert torch.equal(exact.to(parameter.dtype), parameter.detach()), name
        assert float((exact - start[name]).abs().max()) > 1e-4, name
        assert float(moved) > 0, name


def test_clipping_is_of_all_gradients_together_and_gates_do_not_decay() -> None:
    model = initialise(KimiLinear(preset("tiny"), "torch"), 0)
    optimise = Optimiser(model, "adamw", weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 3.0)
    assert float(optimise.step(0.1, 1.0)) == pytest.approx(3 * model.lm_head.weight.numel() ** 0.5, rel=1e-5)
    for name, parameter in model.named_parameters():
        kept = name.endswith(("A_log", "dt_bias", "norm.weight"))
        assert torch.equal(parameter, before[name]) == kept, name


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [8, 17, 96])
def test_tasks_ask_only_what_is_determined(name: str, length: int) -> None:
    task = SyntheticTask(name, length, rows=8, seed=1)
    batch = task.batch(3, CPU)
    again = task.batch(3, CPU)
    assert torch.equal(batch.tokens, again.tokens)
    assert not torch.equal(batch.tokens, task.batch(4, CPU).tokens)
    assert batch.tokens.shape == batch.targets.shape
    assert length - 3 <= batch.tokens.shape[1] <= length
    assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < task.vocab_size
    assert name == "stacks" or bool((batch.targets >= 0).any(1).all())
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        solve = {"palindrome": solve_palindrome, "recall": solve_recall, "stacks": solve_stacks}[name]
        assert solve(tokens, length) == [(place, target) for place, target in enumerate(targets) if target >= 0]


def solve_palindrome(tokens: list[int], _: int) -> list[tuple[int, int]]:
    half = tokens.index(64)
    return [(half + i, tokens[half - 1 - i]) for i in range(half)]


def solve_recall(tokens: list[int], length: int) -> list[tuple[int, int]]:
    separator = tokens.index(SyntheticTask("recall", length, 1).vocab_size - 1)
    known = dict(zip(tokens[:separator:2], tokens[1:separator:2], strict=True))
    return [(place, known[tokens[place]]) for place in range(separator + 1, len(tokens), 2)]


def solve_stacks(tokens: list[int], _: int) -> list[tuple[int, int]]:
    held: dict[int, list[int]] = {}
    found = []
    for place in range(0, len(tokens), 3):
        operation, stack, element = tokens[place : place + 3]
        if operation == 128:
            held.setdefault(stack, []).append(element)
        else:
            assert held[stack].pop() == element
            found.append((place + 1, element))
    return found


def test_documents_are_packed_whole_and_predict_their_own_end(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"first\n\nsecond one\n\n\n\nthird")
    documents = read_documents(path)
    assert documents == (b"first", b"second one", b"third")
    source = ByteText(documents, num_tokens=100, longest=64, seed=0)
    batch = source.batch(0, CPU)
    assert batch.packing is not None
    assert sum(batch.packing.lengths) == 100 == batch.tokens.shape[1]
    for part in list(batch.packing.slices())[:-1]:
        text, following = batch.tokens[0, part].tolist(), batch.targets[0, part].tolist()
        assert text[0] == BEGIN
        assert bytes(text[1:]) in documents
        assert following == [*text[1:], END]
    long = ByteText((bytes(range(200)),), num_tokens=50, longest=20, seed=0).batch(0, CPU)
    assert long.packing is not None
    assert set(long.packing.lengths) == {20, 10}
    path.write_bytes(b"\n\n")
    with pytest.raises(DomainError, match="at least one document"):
        read_documents(path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": "nothing"}, "data must be one of palindrome"),
        ({"length": 4}, "length must be at least 8"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"optimiser": "sgd"}, "optimiser must be one of"),
        ({"mixer": "mamba"}, "mixer must be one of"),
        ({"model": "huge"}, "preset must be one of"),
    ],
)
def test_recipes_are_checked(changes: dict[str, object], match: str, tmp_path: Path) -> None:
    with pytest.raises(DomainError, match=match):
        Run(Recipe(**{**RECALL.to_row(), **changes}), tmp_path)


def test_diverged_run_is_refused(tmp_path: Path) -> None:
    run = Run(Recipe(**{**RECALL.to_row(), "learning_rate": 1e30, "warmup": 0}), tmp_path)
    with pytest.raises(DomainError, match="loss must be finite"):
        run.train()


def test_rates_rise_and_fall() -> None:
    recipe = Recipe(data="recall", steps=100, warmup=10, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert int(np.argmax(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(later <= earlier for earlier, later in zip(rates[10:-1], rates[11:], strict=True))


def test_cache_table_counts_the_bytes_of_a_cache() -> None:
    config = preset("tiny")
    cache = KimiLinear(config, "torch").new_cache(1, page_len=4)
    cache.reserve(24)
    assert cache.num_bytes() == cache_bytes(config, 24, torch.float32)
    released = {row["length"]: float(str(row["saved"])) for row in cache_rows(preset("48b-a3b"), "48b-a3b")}
    assert released[2**20] == pytest.approx(20 / 27, abs=0.002)
    ladder = cache_rows(preset("1.7b"), "1.7b")
    assert float(str(ladder[-1]["saved"])) == pytest.approx(0.75, abs=0.002)


def test_cache_table_of_the_page_is_what_the_command_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| (-?[\d.]+) % \| (-?[\d.]+) % \|$", page, re.MULTILINE)
    ladder = {row["length"]: row for row in cache_rows(preset("1.7b"), "1.7b")}
    expected = [
        (str(row["length"]), f"{float(str(row['bytes'])) / 1e6:.1f}", f"{float(str(row['full_attention_bytes'])) / 1e6:.1f}",
         f"{100 * float(str(row['saved'])):.1f}", f"{100 * float(str(ladder[row['length']]['saved'])):.1f}")
        for row in cache_rows(preset("48b-a3b"), "48b-a3b")
    ]  # fmt: skip
    assert shown == expected


@pytest.mark.parametrize(
    ("name", "billions"), [("653m", 0.653), ("878m", 0.878), ("1.1b", 1.1), ("1.4b", 1.4), ("1.7b", 1.7)]
)
def test_ladder_has_the_activated_parameters_of_its_names(name: str, billions: float) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = KimiLinear(config)
    counts = {key: parameter.numel() for key, parameter in model.named_parameters() if "embed_tokens" not in key}
    activated = sum(
        number * config.num_chosen_experts / config.num_experts if ".experts.w" in key else number
        for key, number in counts.items()
    )
    assert activated / 1e9 == pytest.approx(billions, rel=0.01)


def test_released_model_has_as_many_parameters_as_its_name() -> None:
    with torch.device("meta"):
        model = KimiLinear(preset("48b-a3b"))
    embeddings = 2 * 163840 * 2304
    assert sum(parameter.numel() for parameter in model.parameters()) - embeddings == pytest.approx(48.4e9, rel=0.005)


def test_throughput_accounts_for_the_step() -> None:
    model = initialise(KimiLinear(preset("tiny"), "torch"), 0).train()
    model.recompute = True
    rows = measure(model, Optimiser(model, "muon"), (1, 16), repeats=1)
    assert [row["component"] for row in rows] == [
        "step", "KDA layer", "latent attention", "experts", "dense MLP", "head and loss", "optimiser", "everything else",
    ]  # fmt: skip
    assert [row["number"] for row in rows[1:5]] == [3, 1, 3, 1]
    assert sum(row["share"] for row in rows[1:]) == pytest.approx(1)
