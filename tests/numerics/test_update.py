"""Each update rule against its textbook formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agzo_edge.config import N_MOMENTS
from agzo_edge.numerics.basis import starting_basis
from agzo_edge.numerics.update import (
    Optimizer,
    direction,
    reprojected,
    scheduled_rate,
    stochastically_rounded,
)

FEW = settings(max_examples=30)


def gradients(steps: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 2, generator=generator) for _ in range(steps)]


def trained(optimizer: Optimizer) -> Tensor:
    """Coefficients from zero after six steps of rate 0.1."""
    c = torch.zeros(5, 2)
    moments = [torch.zeros(5, 2) for _ in range(N_MOMENTS[optimizer])]
    for step, gradient in enumerate(gradients()):
        followed, moments = direction(
            gradient, moments, optimizer=optimizer, step_in_window=step, momentum=0.9, beta2=0.99
        )
        c.sub_(followed, alpha=0.1)
    return c


def reference(make: object) -> Tensor:
    c = torch.zeros(5, 2, requires_grad=True)
    optimizer = make([c])  # type: ignore[operator]
    for gradient in gradients():
        c.grad = gradient.clone()
        optimizer.step()
    return c.detach()


def test_sgd_momentum_and_adam_are_those_of_torch() -> None:
    assert_close(trained("sgd"), reference(lambda p: torch.optim.SGD(p, lr=0.1)))
    assert_close(trained("momentum"), reference(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)))
    assert_close(trained("adam"), reference(lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99))))


def test_sign_follows_the_sign_alone() -> None:
    assert_close(trained("sign"), -0.1 * sum(gradient.sign() for gradient in gradients()))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "sign"])
def test_no_gradient_is_no_step(optimizer: Optimizer) -> None:
    moments = [torch.zeros(5, 2) for _ in range(N_MOMENTS[optimizer])]
    zero = torch.zeros(5, 2)
    step, _ = direction(zero, moments, optimizer=optimizer, step_in_window=0, momentum=0.9, beta2=0.99)
    assert torch.equal(step, zero)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "sign"])
def test_the_same_gradients_give_the_same_bytes(optimizer: Optimizer) -> None:
    assert torch.equal(trained(optimizer), trained(optimizer))


def rate(step: int, **settings: object) -> float:
    given = {"peak": 2.0, "schedule": "constant", "warmup_steps": 4, "max_steps": 20, **settings}
    return scheduled_rate(step, **given)  # type: ignore[arg-type]


def test_warm_up_rises_evenly_to_the_peak() -> None:
    assert [rate(step) for step in range(6)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])


def test_the_schedules_after_the_warm_up_are_a_line_and_half_a_cosine() -> None:
    assert rate(12, schedule="linear") == pytest.approx(1.0)
    assert rate(12, schedule="cosine") == pytest.approx(1.0)
    assert rate(8, schedule="cosine") == pytest.approx(1.0 + math.cos(math.pi / 4))


@FEW
@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup_steps=st.integers(0, 30),
    max_steps=st.integers(1, 40),
    data=st.data(),
)
def test_a_rate_is_positive_and_at_most_the_peak_and_never_rises_after_the_warm_up(
    schedule: str, warmup_steps: int, max_steps: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, max_steps - 1))
    settings_ = {"schedule": schedule, "warmup_steps": warmup_steps, "max_steps": max_steps}
    now, after = rate(step, **settings_), rate(step + 1, **settings_)
    assert 0 < now <= 2.0
    if step >= warmup_steps:
        assert after <= now


def test_a_moment_in_the_same_basis_stays_and_in_another_is_its_projection() -> None:
    old, new = starting_basis(16, 3), torch.linalg.qr(torch.randn(16, 3)).Q
    moment = torch.randn(5, 3)
    assert_close(reprojected(moment, old, old), moment, rtol=1e-4, atol=1e-5)
    assert_close(reprojected(moment, old, new) @ new.T, moment @ old.T @ new @ new.T, rtol=1e-4, atol=1e-5)


def rounded(values: Tensor, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2**16, values.shape, generator=generator, dtype=torch.int32)
    return stochastically_rounded(values, random_bits=bits)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-30, -65504.123])
def test_stochastic_rounding_keeps_the_mean_and_takes_only_the_two_neighbours(value: float) -> None:
    values = torch.full((100_000,), value)
    got = rounded(values).double()
    exact = float(values[0].double())
    ulp = float(got.max() - got.min())
    assert got.unique().numel() == 2
    assert abs(float(got.mean()) - exact) < 5 * ulp / 2 / 100_000**0.5
    assert float(got.min()) < exact < float(got.max())


@FEW
@given(value=st.floats(-(2.0**120), 2.0**120, width=32), seed=st.integers(0, 100))
def test_what_bfloat16_can_hold_is_left_exactly_as_it_is(value: float, seed: int) -> None:
    representable = torch.tensor([value] * 50).bfloat16()
    assert torch.equal(rounded(representable.float(), seed=seed), representable)


def test_infinities_stay_what_they_are() -> None:
    assert rounded(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]
