"""The leading input directions, against the eigenvectors of HᵀH."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agzo_edge.numerics.basis import (
    activation_basis,
    next_basis,
    orthonormal,
    starting_basis,
    subspace_product,
)

FEW = settings(max_examples=20)


def spectrum_inputs(tokens: int, singular_values: list[float], in_features: int, *, seed: int = 0) -> Tensor:
    """Random inputs (tokens, in_features) with exactly these singular values."""
    generator = torch.Generator().manual_seed(seed)
    rank = len(singular_values)
    left = torch.linalg.qr(torch.randn(tokens, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(in_features, rank, generator=generator)).Q
    return left * torch.tensor(singular_values) @ right.T


def assert_orthonormal(basis: Tensor) -> None:
    assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=2e-5)


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.T


def leading_eigenvectors(inputs: Tensor, rank: int) -> Tensor:
    _, vectors = torch.linalg.eigh(inputs.double().T @ inputs.double())
    return vectors[:, -rank:].float()


@FEW
@given(in_features=st.integers(1, 200), data=st.data())
def test_a_starting_basis_is_orthonormal(in_features: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(in_features, 64)))
    basis = starting_basis(in_features, rank)
    assert basis.shape == (in_features, rank)
    assert_orthonormal(basis)
    assert torch.equal(basis, starting_basis(in_features, rank))


@pytest.mark.parametrize("in_features", [64, 768, 4096])
def test_a_starting_basis_sees_every_coordinate(in_features: int) -> None:
    assert float(starting_basis(in_features, 4).norm(dim=1).min()) > 0.02 * (4 / in_features) ** 0.5


def test_orthonormal_columns_span_the_same_and_keep_their_direction() -> None:
    columns = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e4, 1.0, 1e-4])
    basis = orthonormal(columns)
    assert_orthonormal(basis)
    assert_close(projector(basis) @ columns, columns, rtol=1e-4, atol=1e-8)
    assert ((basis * columns).sum(0) > 0).all()
    assert_close(orthonormal(basis), basis)


@FEW
@given(seed=st.integers(0, 1000), rank=st.integers(1, 4))
def test_the_basis_spans_the_leading_eigenvectors_of_a_separated_spectrum(seed: int, rank: int) -> None:
    inputs = spectrum_inputs(40, [4.0**-k for k in range(rank + 1)], 24, seed=seed)
    basis = activation_basis(inputs, starting_basis(24, rank), n_iter=6)
    assert_orthonormal(basis)
    assert_close(projector(basis), projector(leading_eigenvectors(inputs, rank)), rtol=0, atol=1e-3)


def test_three_iterations_hold_nearly_the_best_share_of_the_energy() -> None:
    inputs = spectrum_inputs(100, [2.0**-k for k in range(16)], 48)
    basis = activation_basis(inputs, starting_basis(48, 4))
    best = inputs @ leading_eigenvectors(inputs, 4)
    assert float((inputs @ basis).square().sum()) > 0.98 * float(best.square().sum())


def test_a_warm_start_is_better_than_a_cold_one() -> None:
    inputs = spectrum_inputs(100, [1.3**-k for k in range(16)], 48)
    best = projector(leading_eigenvectors(inputs, 4))
    cold = activation_basis(inputs, starting_basis(48, 4))
    warm = cold
    for _ in range(5):
        warm = activation_basis(inputs, warm)
    assert (projector(warm) - best).norm() < 0.1 * (projector(cold) - best).norm()


def test_the_same_inputs_give_the_same_bytes() -> None:
    inputs = spectrum_inputs(20, [3.0, 2.0, 1.0], 16)
    start = starting_basis(16, 2)
    assert torch.equal(activation_basis(inputs, start), activation_basis(inputs, start))


def test_the_product_is_additive_over_tokens_and_equals_the_gram_matrix() -> None:
    inputs = spectrum_inputs(30, [3.0, 2.0, 1.0], 16)
    start = starting_basis(16, 3)
    parts = sum(subspace_product(part, start) for part in inputs.split(7))
    assert_close(parts, inputs.T @ inputs @ start, rtol=1e-5, atol=1e-6)
    in_16_bit = inputs.bfloat16()
    assert_close(subspace_product(in_16_bit, start), subspace_product(in_16_bit.float(), start))


def test_silent_inputs_keep_the_basis() -> None:
    start = starting_basis(16, 3)
    assert_close(activation_basis(torch.zeros(5, 16), start), start)


@FEW
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 3), size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_fewer_tokens_than_rank_are_spanned_and_the_rest_stays_as_it_was(seed: int, tokens: int, size: float) -> None:
    inputs = size * torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed))
    start = starting_basis(64, 6)
    basis = activation_basis(inputs, start)
    assert_orthonormal(basis)
    assert_close(inputs @ projector(basis), inputs, rtol=1e-3, atol=1e-3 * size)
    known = projector(orthonormal(torch.cat([start, inputs.T / size], dim=1)))
    assert_close(known @ basis, basis, rtol=0, atol=1e-2)  # no rounding noise took a place


def test_one_outlying_token_does_not_hide_the_others() -> None:
    inputs = spectrum_inputs(60, [1.0, 0.5], 32)
    inputs = torch.cat([inputs, 1e2 * torch.randn(1, 32, generator=torch.Generator().manual_seed(2))])
    basis = activation_basis(inputs, starting_basis(32, 3))
    assert_orthonormal(basis)
    assert_close(projector(basis), projector(leading_eigenvectors(inputs, 3)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_keeps_the_basis(bad: float) -> None:
    start = starting_basis(16, 3)
    product = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    product[3, 1] = bad
    assert_close(next_basis(product, start), start)
