"""How the certified bounds compare with true errors on many random and adversarial calls.

    python reference/tests/bound_study.py --cases 3000
    python reference/tests/bound_study.py --full-size

The truth is 60 digits for outputs and 150 for single gradient elements, and double-double numbers for every gradient element and
at full size. The exit status is 1 when an error exceeds its bound.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mpmath  # type: ignore[import-untyped]
import numpy as np
import torch
from kda_reference import Certified, certified_kda_vjp, oracle_gradient, oracle_kda, recurrent_kda, recurrent_kda_vjp
from kda_reference.certificate import GRADIENT_NAMES, certified_kda
from kda_reference.double_double_oracle import distance, double_double_kda
from kda_reference.oracle import exact
from reference_cases import GATES, cotangents, make_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kda_reference import KdaInputs
    from torch import Tensor

# Factors on values and states; 106 bits hold only the ordinary ones.
FACTORS = (1.0, 1.0, 1.0, 1e4, 1e-5, 1e25, 1e-160, 1e-185, 1e-230)
ORDINARY = (1e-30, 1e30)


@dataclass
class Tally:
    """Errors against bounds: how many were compared, the largest share of a bound, and bound over error where there is an error."""

    compared: int = 0
    worst: float = 0.0
    exceeded: list[str] = field(default_factory=list)
    slack: list[float] = field(default_factory=list)

    def add(self, what: str, error: np.ndarray[Any, Any], bound: Tensor) -> None:
        """Count one tensor."""
        share = error.astype(np.float64) / bound.numpy()
        self.compared += share.size
        self.worst = max(self.worst, float(share.max(initial=0.0)))
        if (share > 1).any():
            self.exceeded.append(what)
        self.slack += (1 / share[share > 0]).ravel().tolist()

    def __str__(self) -> str:
        """Return the figures in a line."""
        median = statistics.median(self.slack) if self.slack else float("nan")
        return (
            f"{self.compared} elements, {len(self.exceeded)} tensors beyond their bound, largest error/bound {self.worst:.3g}, "
            f"median bound/error {median:.3g}"
        )


def random_call(seed: int) -> KdaInputs:
    """Draw a small call: any flags, gate, keys and magnitude."""
    rng = random.Random(seed)  # noqa: S311 - no secrets here
    heads = rng.choice((1, 1, 2))
    options: dict[str, Any] = {
        "seed": seed,
        "T": rng.randint(1, 24),
        "H": heads,
        "G": heads * rng.choice((1, 1, 2)),
        "K": rng.randint(1, 6),
        "V": rng.randint(1, 4),
        "gate": rng.choice(GATES),
        "key": rng.choice(("random", "repeated", "near")),
        "beta": rng.choice(((0.0, 1.0), (0.9, 1.0), (0.0, 2.0), (1.95, 2.0), (2.0, 2.0))),
        "state": rng.random() < 0.7,
        "l2norm": rng.random() < 0.3,
        "gate_form": rng.choice((None, None, "softplus", "bounded")),
        "beta_form": rng.choice((None, None, "sigmoid", "doubled")),
        "scale": rng.choice((None, None, 1.7)),
        "dtype": rng.choice((torch.float64, torch.float32, torch.bfloat16)),
    }
    if rng.random() < 0.25:
        options["lengths"] = tuple(rng.randint(0, 9) for _ in range(3))
    inputs = make_inputs(**options)
    factor = rng.choice(FACTORS) if inputs.q.dtype == torch.float64 else 1.0
    state = None if inputs.initial_state is None else inputs.initial_state * factor
    return inputs.replace(v=inputs.v * factor, initial_state=state)


def is_ordinary(inputs: KdaInputs) -> bool:
    """Tell whether double-double numbers hold what such a call computes."""
    sizes = inputs.v.double().abs()
    return bool((sizes[sizes > 0] > ORDINARY[0]).all() and (sizes < ORDINARY[1]).all())


def compare_with_digits(inputs: KdaInputs, certified: Certified, seed: int, tally: Tally) -> None:
    """Compare all outputs with 60 digits, and one element of each gradient with central differences of 150."""
    truth, (do, dfinal_state) = oracle_kda(inputs), cotangents(inputs)
    with mpmath.workdps(60):
        for name, expected in (("o", truth.o), ("final_state", truth.final_state)):
            tally.add(f"{name} of {seed}", abs(exact(certified.value[name]) - expected), certified.bound[name])
    rng = np.random.default_rng(seed)
    for name, tensor in inputs.tensors().items():
        if tensor.numel():
            index = tuple(int(rng.integers(size)) for size in tensor.shape)
            expected = oracle_gradient(inputs, do, dfinal_state, name, index, digits=150)
            value, bound = (kind[GRADIENT_NAMES[name]][index] for kind in (certified.value, certified.bound))
            with mpmath.workdps(60):
                error = np.array(float(abs(mpmath.mpf(value.item()) - expected)))
            tally.add(f"d{name} of {seed}", error, bound)


def compare_with_double_double(inputs: KdaInputs, certified: Certified, seed: int, tally: Tally) -> None:
    """Compare every output and gradient with double-double numbers."""
    for name, expected in double_double_kda(inputs, *cotangents(inputs)).items():
        tally.add(f"{name} of {seed}", distance(certified.value[name], expected), certified.bound[name])


def study(seeds: Iterable[int]) -> tuple[Tally, Tally]:
    """Compare drawn calls with 60 digits, and those of ordinary magnitude with double-double numbers."""
    by_digits, by_pairs = Tally(), Tally()
    for seed in seeds:
        inputs = random_call(seed)
        certified = certified_kda_vjp(inputs, *cotangents(inputs))
        compare_with_digits(inputs, certified, seed, by_digits)
        if is_ordinary(inputs):
            compare_with_double_double(inputs, certified, seed, by_pairs)
    return by_digits, by_pairs


FULL_SIZE: dict[str, dict[str, Any]] = {
    "moderate gates": {},
    "no gate": {"gate": "zero"},
    "constant gate": {"gate": "one_channel"},
    "near-identical keys, beta 1.92 to 2": {"gate": "stagnant", "key": "near", "beta": (1.92, 2.0)},
    "everything in the kernel": {"l2norm": True, "gate_form": "softplus", "beta_form": "doubled"},
}


def full_size(name: str, tokens: int, width: int) -> bool:
    """Print accuracy and cost of one call at full size; return whether all bounds held."""
    inputs = make_inputs(T=tokens, K=width, V=width, **FULL_SIZE[name])
    do, dfinal_state = cotangents(inputs)
    plain, bounded = best_of(lambda: recurrent_kda(inputs)), best_of(lambda: certified_kda(inputs))
    plain_back = best_of(lambda: recurrent_kda_vjp(inputs, do, dfinal_state))
    bounded_back = best_of(lambda: certified_kda_vjp(inputs, do, dfinal_state))
    certified, tally = certified_kda_vjp(inputs, do, dfinal_state), Tally()
    relative = float(certified.bound["o"].max() / certified.value["o"].abs().max())
    start = time.process_time()
    compare_with_double_double(inputs, certified, 0, tally)
    oracle_cost = time.process_time() - start
    print(  # noqa: T201 - a command
        f"{name}: {tally}; bound/max|o| {relative:.2g}; forward {bounded:.2f} s against {plain:.2f} s, "
        f"with gradients {bounded_back:.2f} s against {plain_back:.2f} s, oracle {oracle_cost:.0f} s",
        flush=True,
    )
    return not tally.exceeded


def best_of(run: Callable[[], object], times: int = 3) -> float:
    """Return the least processor time of some runs, in seconds."""
    costs = []
    for _ in range(times):
        start = time.process_time()
        run()
        costs.append(time.process_time() - start)
    return min(costs)


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000, help="drawn calls")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--full-size", action="store_true", help="T = 4096, K = V = 128 instead of drawn calls")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.full_size:
        return 0 if min([full_size(name, 4096, 128) for name in FULL_SIZE]) else 1
    by_digits, by_pairs = study(range(options.first_seed, options.first_seed + options.cases))
    print(f"{options.cases} calls against 60 digits: {by_digits}")  # noqa: T201 - a command
    print(f"against double-double numbers: {by_pairs}")  # noqa: T201 - a command
    for what in by_digits.exceeded + by_pairs.exceeded:
        print(f"beyond its bound: {what}")  # noqa: T201 - a command
    return 1 if by_digits.exceeded or by_pairs.exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
