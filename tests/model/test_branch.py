"""A branch is plain tensors: what it learned, and how its windows fold."""

import pytest
import torch
from torch.testing import assert_close

from agzo_edge.model.branch import Branch, make_branches
from agzo_edge.numerics.basis import starting_basis


def no_rounding() -> torch.Tensor:
    pytest.fail("only a held weight is rounded")


def branch(rank: int = 2) -> Branch:
    return make_branches([("layer", 8, 0)], [6], rank=rank)[0]


def learn(b: Branch, seed: int) -> torch.Tensor:
    """One window's worth of coefficients in a basis of its own; the dense change."""
    generator = torch.Generator().manual_seed(seed)
    b.group.basis = torch.linalg.qr(torch.randn(6, b.group.rank, generator=generator)).Q
    b.c = torch.randn(8, b.group.rank, generator=generator)
    b.steps_in_window = 3
    return b.c @ b.group.basis.T


def test_a_new_branch_has_learned_nothing() -> None:
    b = branch()
    assert torch.equal(b.learned().dense(), torch.zeros(8, 6))
    assert b.is_untouched
    assert b.window is None
    assert b.folded_in(torch.float32) is None
    assert b.fold(keep_rank=1, random_bits=no_rounding) == 0.0
    assert b.folded.rank == 0


def test_branches_of_one_group_share_its_basis_object() -> None:
    first, second, third = make_branches([("a", 8, 0), ("b", 5, 0), ("c", 4, 1)], [6, 3], rank=4)
    assert first.group is second.group
    assert third.group.rank == 3
    assert torch.equal(third.group.basis, starting_basis(3, 3))
    assert third.c.shape == (4, 3)


def test_folding_keeps_the_sum_and_starts_an_empty_window() -> None:
    b = branch()
    total = torch.zeros(8, 6)
    for window in range(3):
        total += learn(b, window)
        assert_close(b.learned().dense(), total)
        assert b.fold(keep_rank=16, random_bits=no_rounding) == 0.0
        assert b.steps_in_window == 0
        assert not b.c.any()
        assert_close(b.learned().dense(), total)
    assert b.folded.rank == 6


def test_folding_compresses_once_the_sum_is_twice_as_wide_as_it_may_stay() -> None:
    b = branch()
    ranks, left_out = [], []
    for window in range(5):
        learn(b, window)
        left_out.append(b.fold(keep_rank=2, random_bits=no_rounding))
        ranks.append(b.folded.rank)
    assert ranks == [2, 4, 2, 4, 2]
    assert [share > 0 for share in left_out] == [False, False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folded_windows_are_cast_once_and_follow_every_fold(dtype: torch.dtype) -> None:
    b = branch()
    for window in range(3):
        learn(b, window)
        assert b.window is b.c
        b.fold(keep_rank=16, random_bits=no_rounding)
        assert b.window is None
        folded = b.folded_in(dtype)
        assert folded is not None
        assert b.folded_in(dtype) is folded
        assert_close(folded.dense().float(), b.folded.dense(), rtol=0.05, atol=0.05)
