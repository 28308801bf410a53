"""The benchmark: what is counted, who gets how many turns, and that nothing wrong gets a number."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kda_conformance import bench, timing, workloads
from kda_conformance.cli import FAIL, NOTHING, USAGE, app
from kda_conformance.contenders import KdaContender
from kda_conformance.layer_contenders import FUNCTIONS, LayerContender
from kda_conformance.layer_workloads import LayerWorkload, layer_catalogue
from kda_conformance.workloads import PACKED, Workload
from kda_reports.timings import read_timings
from typer.testing import CliRunner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORKLOADS = [
    Workload(lengths=(70,), H=2, B=3, width=16),
    Workload(lengths=(33, 64, 31), H=2, width=16, gate="bounded"),
    Workload(lengths=(64,), H=1, width=8, dtype="float64", backward=True),
    Workload(lengths=(1,), H=2, B=4, width=16, step=True),
]
SIDES = """
import torch
from kda_reference import chunkwise_kda
calls = 0
def right(q, k, v, g, beta, **options):
    return chunkwise_kda(q, k, v, g, beta, dtype=torch.float64, **options)
def scaled(*operands, **options):
    o, state = right(*operands, **options)
    return 1.01 * o, state
def crashes(*operands, **options):
    raise RuntimeError("no kernel for this device")
def forgetful(*operands, **options):
    global calls
    calls += 1
    o, state = right(*operands, **options)
    return (o, state) if calls < 2 else (o * float("nan"), state)
right.precision = scaled.precision = crashes.precision = forgetful.precision = "fp64"
def narrow(*operands, **options):
    return right(*operands, **options)
narrow.precision = "fp64"
narrow.gate_in_kernel = False
"""


@pytest.fixture
def sides(tmp_path: Path) -> Callable[[str], str]:
    path = tmp_path / "sides.py"
    path.write_text(SIDES)
    return lambda name: f"{path}:{name}"


def run(out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    result = CliRunner().invoke(app, ["bench", "--rounds", "2", "--device", "cpu", "--out", str(out), *arguments])
    path = out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return result.exit_code, [row for row in rows if row["kind"] == "bench"]


ONE = ("--select", "forward-softplus-T64-*")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: str(workload.name))
def test_counted_bytes_are_those_of_the_tensors(workload: Workload) -> None:
    inputs, cotangents = workload.inputs(0, "cpu"), workload.cotangents(0, "cpu")
    size = sum(tensor.nbytes for tensor in inputs.tensors().values())
    outputs = sum(tensor.nbytes for tensor in cotangents)
    assert (workload.input_bytes, workload.output_bytes) == (size, outputs)
    # Gradients are as large as the arguments.
    passes = size + outputs + (size + outputs + size if workload.backward else 0)
    assert workload.least_bytes == passes


def test_counted_operations_are_those_of_the_report() -> None:
    (T, H, d, C) = 8192, 96, 128, 64
    forward = Workload(lengths=(T,), H=H)
    assert forward.flop == H * (6 * T * d**2 + 3 * T * C * d + T * C**2)
    assert Workload(lengths=(T,), H=H, backward=True).flop == 3 * forward.flop
    assert Workload(lengths=PACKED, H=H).flop == forward.flop


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads_have_one_name_each_and_a_quick_set(device: str) -> None:
    found = workloads.catalogue(device)
    assert len({workload.name for workload in found}) == len(found)
    assert workloads.select(found, ["quick"])
    assert all(workload.labels for workload in found)


def test_the_table_holds_every_shape_of_the_targets() -> None:
    table = workloads.select(workloads.catalogue("cuda"), ["table"])
    wanted = {((8192,), 96), (PACKED, 96), ((8192,), 64), ((65536,), 16), ((8192,), 16)}
    for gate in ("softplus", "bounded"):
        for backward in (False, True):
            assert {(w.lengths, w.H) for w in table if (w.gate, w.backward) == (gate, backward)} == wanted


def test_a_workload_is_judged_with_its_own_flags() -> None:
    for workload in [*WORKLOADS, *workloads.catalogue("cpu")]:
        timed, judged = workload.inputs(0, "cpu"), workload.gate_case.inputs(workload.inputs(0, "cpu").q.dtype)
        for name, value in timed.keywords().items():
            other = getattr(judged, name)
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.dim()) == (other.dtype, other.dim()), name
            elif name != "chunk_size":
                assert value == other, name


class Ticks:
    """A clock that advances by one at every mark."""

    def __init__(self) -> None:
        self.now = 0

    def mark(self) -> object:
        self.now += 1
        return self.now

    def seconds(self, start: object, end: object) -> float:
        assert isinstance(start, int)
        assert isinstance(end, int)
        return float(end - start)

    def wait(self) -> None: ...


def test_sides_get_equally_many_turns_in_a_rotated_order_on_sets_in_rotation() -> None:
    called: list[tuple[str, int]] = []
    sides = {name: [lambda name=name, i=i: called.append((name, i)) for i in range(7)] for name in ("a", "b", "c")}
    spreads = timing.take_turns(sides, rounds=6, calls=2, clock=Ticks())
    assert Counter(name for name, _ in called) == dict.fromkeys("abc", 12)
    assert [name for name, _ in called[::6]] == ["a", "b", "c", "a", "b", "c"]
    assert [number for _, number in called] == [i % 7 for i in range(36)]
    assert {name: spread.samples for name, spread in spreads.items()} == dict.fromkeys("abc", (0.5,) * 6)


def test_a_spread_is_a_median_with_its_deviation_and_quartiles() -> None:
    spread = timing.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.median, spread.mad, spread.q1, spread.q3, spread.least) == (3.0, 1.0, 2.0, 4.0, 1.0)


def test_what_is_judged_wrong_or_raises_has_no_number_and_the_status_says_so(
    tmp_path: Path, sides: Callable[[str], str]
) -> None:
    named = [word for name in ("right", "scaled", "crashes") for word in ("--impl", sides(name))]
    status, rows = run(tmp_path / "out", *ONE, *named)
    assert status == FAIL
    assert [row["outcome"] for row in rows] == ["measured", "red", "error"]
    assert rows[0]["time"]["median"] > 0
    for row in rows[1:]:
        assert [row[name] for name in ("time", "bytes_per_s", "flop_per_s", "peak_bytes")] == [None] * 4
    assert "breaks the law" in rows[1]["message"]
    assert "kda reproduce" in rows[1]["message"]
    assert rows[1]["score"] > 1
    assert "no kernel for this device" in rows[2]["message"]


def test_results_of_the_workload_itself_must_be_finite(tmp_path: Path, sides: Callable[[str], str]) -> None:
    status, rows = run(tmp_path / "out", *ONE, "--impl", sides("forgetful"))
    assert (status, rows[0]["outcome"], rows[0]["time"]) == (FAIL, "red", None)
    assert "finite" in rows[0]["message"]


def test_what_is_not_claimed_is_not_timed_and_an_empty_run_is_no_pass(
    tmp_path: Path, sides: Callable[[str], str]
) -> None:
    status, rows = run(tmp_path / "out", *ONE, "--impl", sides("narrow"))
    assert (status, rows[0]["outcome"], rows[0]["time"]) == (NOTHING, "unclaimed", None)


def test_an_empty_selection_is_no_pass(tmp_path: Path, sides: Callable[[str], str]) -> None:
    assert run(tmp_path / "out", "--select", "no-such-workload", "--impl", sides("right")) == (NOTHING, [])


def test_one_side_named_twice_and_an_operator_without_its_device_are_bad_usage(
    tmp_path: Path, sides: Callable[[str], str]
) -> None:
    assert run(tmp_path, "--impl", sides("right"), "--impl", sides("right"))[0] == USAGE
    assert run(tmp_path, "--impl", sides("right"), "--other", "fla-none")[0] == USAGE


def test_the_command_leaves_rows_that_the_reports_read_and_a_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kda_conformance", "bench", "--quick", "--rounds", "2", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    timings, unfinished = read_timings([tmp_path / "rows.jsonl"])
    assert unfinished == []
    quick = workloads.select(workloads.catalogue("cpu"), ["quick"])
    assert len(timings) == 2 * len(quick)
    assert {t.time.num_samples for t in timings if t.time is not None} == {2}
    assert all(t.fingerprint["torch"] == torch.__version__ for t in timings)
    assert "sides timed on" in (tmp_path / "bench.html").read_text()


def test_the_tests_of_pytest_benchmark_judge_first(tmp_path: Path, sides: Callable[[str], str]) -> None:
    suite = [sys.executable, "-m", "pytest", "--pyargs", "kda_conformance.benchmarks", "-q", "-p", "no:cacheprovider"]
    options = ["-p", "no:xdist", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "-k", "T33"]
    saved: dict[str, tuple[int, Any]] = {}
    for name in ("right", "scaled"):
        to = tmp_path / f"{name}.json"
        command = [*suite, *options, "--impl", sides(name), f"--benchmark-json={to}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        saved[name] = done.returncode, json.loads(to.read_text()) if to.is_file() and to.stat().st_size else None
    status, found = saved["right"]
    assert status == 0
    assert found["machine_info"]["kda"]["torch"] == torch.__version__
    assert len(found["benchmarks"]) == 1
    status, found = saved["scaled"]
    assert status == 1
    assert not (found or {}).get("benchmarks")


def test_a_side_is_judged_once_per_set_of_flags(sides: Callable[[str], str]) -> None:
    side = KdaContender(sides("right"), "cpu")
    one, two = (Workload(lengths=(length,), H=2, width=16, dtype="float64") for length in (2200, 4096))
    assert one.gate_case == two.gate_case
    small = Workload(lengths=(40,), H=1, width=8, dtype="float64")
    assert side.judge(small) is side.judge(small)
    assert bench.num_input_sets(small, "cpu") >= bench.FEWEST_SETS


@pytest.mark.parametrize("workload", layer_catalogue("cpu"), ids=lambda workload: str(workload.name))
def test_parts_of_a_layer_are_judged_and_their_bytes_are_those_of_the_tensors(workload: LayerWorkload) -> None:
    side = LayerContender("kda-optimized", "cpu")
    assert side.takes(workload)
    judged = side.judge(workload)
    assert (judged.outcome, judged.message) == ("measured", "")
    inputs = workload.inputs(0, "cpu")
    outputs = workload.expected(inputs).nbytes + (inputs["tails"].nbytes if "tails" in inputs else 0)
    size = sum(tensor.nbytes for tensor in inputs.values())
    assert workload.least_bytes == size + outputs + (size + outputs + size if workload.backward else 0)


def test_a_part_that_is_wrong_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = layer_catalogue("cpu")[0]
    side = LayerContender("kda-optimized", "cpu")
    name = FUNCTIONS[workload.part]
    wrong = SimpleNamespace(**{name: lambda x, weight: x + weight.sum()})
    monkeypatch.setattr(side, "_module", wrong)
    (row,) = bench.measure([side], workload, "cpu", 2)
    assert (row["outcome"], row["time"], row["operator"]) == ("red", None, "convolution")
    assert "result must be within" in row["message"]
