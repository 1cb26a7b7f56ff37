"""Sums of low-rank changes, against the dense matrices they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agzo_edge.numerics.lowrank import LowRank, compressed, zero_lowrank

FEW = settings(max_examples=20)


def random_pair(out_features: int, in_features: int, rank: int, *, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(out_features, rank, generator=generator) * 1.5 ** -torch.arange(rank)
    return LowRank(c, torch.randn(in_features, rank, generator=generator))


def test_a_zero_change_is_dense_zeros_of_rank_zero() -> None:
    zero = zero_lowrank(3, 5)
    assert zero.rank == 0
    assert torch.equal(zero.dense(), torch.zeros(3, 5))


def test_plus_is_the_dense_sum() -> None:
    a, b = random_pair(7, 5, 2), random_pair(7, 5, 3, seed=1)
    assert a.plus(b).rank == 5
    assert_close(a.plus(b).dense(), a.dense() + b.dense())
    assert_close(zero_lowrank(7, 5).plus(a).dense(), a.dense())


@FEW
@given(
    out_features=st.integers(1, 20),
    in_features=st.integers(1, 20),
    rank=st.integers(1, 30),
    keep=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_compression_is_the_truncated_svd_and_tells_the_energy_left_out(
    out_features: int, in_features: int, rank: int, keep: int, seed: int
) -> None:
    pair = random_pair(out_features, in_features, rank, seed=seed)
    small, left_out = compressed(pair, keep)
    u, sigma, vt = torch.linalg.svd(pair.dense().double(), full_matrices=False)
    best = (u[:, :keep] * sigma[:keep]) @ vt[:keep]
    assert small.rank <= keep
    if pair.rank <= keep:
        assert small is pair
        assert left_out == 0.0
        return
    error = (small.dense().double() - pair.dense()).norm()
    assert float(error) <= float((best - pair.dense()).norm()) * (1 + 1e-4) + 1e-5 * float(sigma[0])
    energy = sigma.square()
    assert left_out == pytest.approx(float(energy[keep:].sum() / energy.sum()), abs=1e-5)


def test_compression_shares_the_singular_values_between_the_factors() -> None:
    small, _ = compressed(random_pair(12, 10, 8), 3)
    assert_close(small.c.norm(dim=0), small.a.norm(dim=0))


def test_compressing_twice_gives_the_same_bytes() -> None:
    pair = random_pair(12, 10, 8)
    first, second = compressed(pair, 3)[0], compressed(pair, 3)[0]
    assert torch.equal(first.c, second.c)
    assert torch.equal(first.a, second.a)


def test_a_change_of_nothing_compresses_to_nothing() -> None:
    small, left_out = compressed(LowRank(torch.zeros(4, 6), torch.zeros(5, 6)), 2)
    assert left_out == 0.0
    assert torch.equal(small.dense(), torch.zeros(4, 5))
