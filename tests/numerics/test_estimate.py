"""Losses in, numbers for a step out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agzo_edge.numerics.basis import starting_basis
from agzo_edge.numerics.estimate import (
    Spread,
    clipped,
    gradient_estimate,
    mean_square,
    projected_gradients,
)
from agzo_edge.numerics.noise import NoiseKind, draw_noise, guided_noise


def test_projected_gradients_are_the_textbook_differences() -> None:
    losses = torch.tensor([[2.0, 3.0], [1.0, 3.5]])
    assert projected_gradients(losses, mu=0.5, difference="central").tolist() == [1.0, -0.5]
    assert projected_gradients(losses, mu=0.5, difference="forward").tolist() == [2.0, -1.0]
    assert projected_gradients(losses, mu=0.5, difference="exact").tolist() == [1.0, 3.5]


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("guided", [False, True])
def test_the_estimates_mean_is_the_gradient_inside_the_basis_or_along_the_guide(kind: NoiseKind, guided: bool) -> None:
    # loss_b(W) = ½ ‖W H_b − T_b‖²: a quadratic, so the derivative along R Aᵀ is exactly <∇_b, R Aᵀ>
    generator = torch.Generator().manual_seed(0)
    examples, out_features, in_features, rank, draws = 3, 4, 6, 2, 4000
    gradients = torch.randn(examples, out_features, in_features, generator=generator)
    weights = torch.tensor([0.5, 0.3, 0.2])
    basis = starting_basis(in_features, rank)
    guide = torch.randn(out_features, rank, generator=generator)
    key = {"seed": 1, "layer": 0, "first_example": 0}
    shape = (examples, out_features, rank)
    estimates = []
    for step in range(draws):
        if guided:
            noise = guided_noise(kind, examples, guide, step=step, **key)
        else:
            noise = draw_noise(kind, shape, step=step, **key)
        projected = (gradients * (noise.dense() @ basis.T)).sum((1, 2))
        estimates.append(gradient_estimate(noise, weights * projected) @ basis.T)
    stacked = torch.stack(estimates)
    expected = torch.einsum("b,boi->oi", weights, gradients) @ basis
    if guided:
        expected = (guide * expected).sum() * guide
    expected = expected @ basis.T
    error = (stacked.mean(0) - expected).abs() / (stacked.std(0) / draws**0.5 + 1e-5)  # a guide's signs leave none
    assert float(error.max()) < 5  # standard errors
    assert float(stacked.mean(0).norm()) > 10 * float((stacked.mean(0) - expected).norm())


@settings(max_examples=20)
@given(examples=st.integers(1, 5), out_features=st.integers(1, 9), rank=st.integers(1, 4))
def test_the_estimate_is_the_weighted_sum_of_the_noise(examples: int, out_features: int, rank: int) -> None:
    noise = draw_noise("sign", (examples, out_features, rank), seed=1, step=2, layer=3, first_example=0)
    weighted = torch.linspace(-1, 2, examples)
    expected = sum(w * r for w, r in zip(weighted, noise.dense(), strict=True))
    assert_close(gradient_estimate(noise, weighted), expected)


def test_the_spread_is_an_exponential_mean_with_its_bias_corrected() -> None:
    steps = [torch.tensor(values) for values in ([1.0, 2.0], [3.0, -4.0], [0.5, 0.0])]
    spread = Spread()
    assert spread.root_mean_square() == 0.0
    for step in steps:
        spread = spread.with_step(step)
    shares = [Spread.DECAY**age for age in (2, 1, 0)]
    expected = sum(s * mean_square(x) for s, x in zip(shares, steps, strict=True)) / sum(shares)
    assert spread.root_mean_square() == pytest.approx(math.sqrt(expected), rel=1e-12)


def test_the_first_spread_is_that_of_the_first_step() -> None:
    spread = Spread().with_step(torch.tensor([3.0, 4.0]))
    assert spread.root_mean_square() == pytest.approx(math.sqrt(12.5))


def test_a_spread_goes_on_from_its_two_numbers() -> None:
    first = Spread().with_step(torch.tensor([1.0])).with_step(torch.tensor([5.0]))
    second = Spread(total=first.total, steps=first.steps)
    assert first.with_step(torch.tensor([2.0])) == second.with_step(torch.tensor([2.0]))


def test_what_is_normalized_has_the_spread_as_its_unit() -> None:
    projected = torch.tensor([3.0, -4.0])
    assert_close(Spread().with_step(projected).normalized(projected), projected / math.sqrt(12.5))
    assert not Spread().with_step(torch.zeros(2)).normalized(torch.zeros(2)).any()


def test_clipping_cuts_both_ends_and_a_limit_of_zero_cuts_nothing() -> None:
    projected = torch.tensor([-5.0, 0.5, 9.0])
    assert clipped(projected, limit=2.0).tolist() == [-2.0, 0.5, 2.0]
    assert clipped(projected, limit=0.0) is projected
