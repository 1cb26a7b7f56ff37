"""Finite differences beside exact ones."""

import math

import pytest
import torch
from helpers import run_config, tiny_examples, tiny_model

from agzo_edge.train.data import DataReport, ExampleSet
from agzo_edge.train.fidelity import LARGEST_ERROR, SIZES, Fidelity, fidelity, relative_error
from agzo_edge.train.goal import goal_of
from agzo_edge.train.probe import MuProbe


def example_set(n: int) -> ExampleSet:
    return ExampleSet(tiny_examples(n), DataReport("text", n, n, 0, 0, 0, 0), "")


def seen_with(dtype: str, **settings: object) -> Fidelity:
    config = run_config(dtype=dtype, batch_size=8, **settings)
    return fidelity(tiny_model(dtype=dtype), example_set(12), config, goal=goal_of(config))


def test_the_error_falls_with_curvature_and_rises_with_rounding() -> None:
    seen = dict(zip(SIZES, seen_with("float32").errors, strict=True))
    assert seen[0.3] > 10 * seen[0.01]
    assert seen[0.01] < 0.01
    assert seen[0.0001] > seen[0.003]


def test_bfloat16_wants_a_larger_perturbation_and_mu_auto_finds_it() -> None:
    coarse, fine = seen_with("bfloat16"), seen_with("float32")
    assert coarse.best > fine.best
    assert coarse.error_of_auto > 10 * fine.error_of_auto
    assert coarse.errors[-1] > 1.0
    assert coarse.error_of_auto < 2 * min(coarse.errors)


def test_a_forward_difference_is_further_off_than_a_central_one() -> None:
    central, forward = (seen_with("float32", difference=kind) for kind in ("central", "forward"))
    assert forward.errors[SIZES.index(0.01)] > 3 * central.errors[SIZES.index(0.01)]


def test_looking_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    before = [(branch.group.basis.clone(), branch.scale, branch.c.clone()) for branch in model.branches]
    config = run_config(batch_size=8, micro_batch_size=2)
    fidelity(model, example_set(12), config, goal=goal_of(config))
    for branch, (basis, scale, c) in zip(model.branches, before, strict=True):
        assert torch.equal(branch.group.basis, basis)
        assert branch.scale == scale
        assert torch.equal(branch.c, c)


def fidelity_of(errors: dict[float, float], *, auto: float) -> Fidelity:
    """What was seen, when these sizes had these errors and mu auto takes `auto`."""
    return Fidelity(tuple(errors), tuple(errors.values()), MuProbe(auto, 0.1, tuple(errors), ()))


@pytest.mark.parametrize(
    ("errors", "advice"),
    [
        ({0.1: 0.2, 0.01: 0.4}, "--mu auto is right"),
        ({0.1: 0.2, 0.01: 2 * LARGEST_ERROR}, "use --mu 0.1,"),
        ({0.1: math.nan, 0.01: 2.0}, "--difference exact"),
        ({0.1: math.nan, 0.01: math.nan}, "--difference exact"),
    ],
)
def test_the_advice_follows_the_error_at_the_size_that_auto_takes(errors: dict[float, float], advice: str) -> None:
    assert advice in fidelity_of(errors, auto=0.01).advice


def test_the_error_is_relative_and_nan_where_nothing_can_be_compared() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 6.0]), exact) == pytest.approx(0.4)
    assert math.isnan(relative_error(torch.tensor(math.nan), exact))
    assert math.isnan(relative_error(exact, torch.zeros(2)))
