"""A deliberately wrong reference is caught, each time by at least two tests that have nothing in common.

The wrong line is put into the function that every test calls; the tests themselves are called as they are.
"""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import test_reference_adjoint
import test_reference_certificate
import test_reference_chunkwise
import test_reference_model_parts
import test_reference_recurrence
from kda_reference import activations, adjoint, recurrence
from reference_cases import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Callable


class Mutant(NamedTuple):
    """A function, a line of it, what is put in its place, and the tests that must fail."""

    function: Callable[..., Any]
    right: str
    wrong: str
    tests: tuple[Callable[[], None], ...]


MUTANTS = {
    "decay_after_the_error": Mutant(
        recurrence.recurrence,
        "error = v - read(decayed, k)",
        "error = v - read(state, k)",
        (
            lambda: test_reference_certificate.test_bounds_hold_for_outputs(VARIANTS["plain"]),
            test_reference_model_parts.test_gate_alike_in_every_channel_is_gated_delta_net,
            lambda: test_reference_chunkwise.test_every_flag_gives_the_recurrence(VARIANTS["plain"]),
        ),
    ),
    "eps_outside_the_root": Mutant(
        activations.inverse_norm,
        "(x.square().sum(-1, keepdim=True) + L2_EPSILON).rsqrt()",
        "1 / (x.square().sum(-1, keepdim=True).sqrt() + L2_EPSILON)",
        (
            lambda: test_reference_certificate.test_bounds_hold_for_outputs(VARIANTS["l2norm"]),
            test_reference_recurrence.test_activations_may_be_applied_beforehand,
        ),
    ),
    "gradient_without_the_final_state": Mutant(
        adjoint.spread_cotangents,
        "call_layout(inputs, dfinal_state.double())",
        "call_layout(inputs, 0 * dfinal_state.double())",
        (
            lambda: test_reference_adjoint.test_sixty_digits_give_the_same_gradients(VARIANTS["plain"]),
            lambda: test_reference_adjoint.test_autograd_of_the_chunkwise_form_gives_the_same_gradients(
                VARIANTS["plain"]
            ),
            lambda: test_reference_adjoint.test_outputs_are_homogeneous_in_values_and_state("moderate"),
            lambda: test_reference_adjoint.test_adjoint_identity_holds_along_random_directions("moderate", (0.0, 1.0)),
        ),
    ),
}


def edited(mutant: Mutant) -> types.CodeType:
    """Return the code of the function with its wrong line."""
    text = inspect.getsource(mutant.function)
    assert text.count(mutant.right) == 1
    module = compile(
        "from __future__ import annotations\n" + text.replace(mutant.right, mutant.wrong), "mutant", "exec"
    )
    return next(
        code
        for code in module.co_consts
        if isinstance(code, types.CodeType) and code.co_name == mutant.function.__name__
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_reference_is_caught_by_two_independent_tests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    assert len(mutant.tests) >= 2
    for test in mutant.tests:
        test()
    monkeypatch.setattr(mutant.function, "__code__", edited(mutant))
    for test in mutant.tests:
        with pytest.raises(AssertionError):
            test()
