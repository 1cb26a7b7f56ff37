"""The loss, against torch's and by hand."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agzo_edge.numerics import loss
from agzo_edge.numerics.loss import choice_losses, label_losses, option_table, row_sums

HIDDEN, VOCAB = 8, 37
MIB = 1024**2


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The losses of logits that are there already."""
    return label_losses(logits, labels, [(slice(0, logits.shape[-1]), lambda states: states)], chunk_bytes=MIB)


def hidden_and_labels(streams: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(streams, positions, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (positions,), generator=generator)
    return hidden, labels, torch.randn(VOCAB, HIDDEN, generator=generator)


def test_token_losses_are_torchs_cross_entropy() -> None:
    hidden, labels, head = hidden_and_labels(2, 11)
    logits = hidden @ head.T
    expected = torch.stack([F.cross_entropy(stream, labels, reduction="none") for stream in logits])
    assert_close(token_losses(logits, labels), expected)


def test_token_losses_in_16_bit_are_summed_in_float32() -> None:
    hidden, labels, head = hidden_and_labels(1, 11)
    logits = (hidden @ head.T).bfloat16()
    assert token_losses(logits, labels).dtype is torch.float32
    assert_close(token_losses(logits, labels), token_losses(logits.float(), labels))


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[3e4, -3e4, 0.0]]])
    assert token_losses(logits, torch.tensor([0])).tolist() == [[0.0]]
    assert token_losses(logits, torch.tensor([1])).tolist() == [[6e4]]


@pytest.mark.parametrize("chunk", [1, 3, 11, 1000])
def test_the_size_of_a_chunk_does_not_matter(chunk: int) -> None:
    hidden, labels, head = hidden_and_labels(2, 11)
    seen: list[int] = []

    def logits_of(states: Tensor) -> Tensor:
        seen.append(states.shape[0] // hidden.shape[0])
        return states @ head.T

    got = label_losses(hidden, labels, [(slice(0, VOCAB), logits_of)], chunk_bytes=chunk * 4 * VOCAB * 2)
    assert max(seen) == min(chunk, 11)
    assert sum(seen) == 11
    assert_close(got, token_losses(hidden @ head.T, labels))


@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(1, VOCAB - 1), unique=True, max_size=5),
    positions=st.integers(1, 9),
    size=st.sampled_from([1.0, 300.0]),
)
def test_a_vocabulary_in_parts_gives_the_losses_of_the_whole(cuts: list[int], positions: int, size: float) -> None:
    hidden, labels, head = hidden_and_labels(2, positions)
    edges = [0, *sorted(cuts), VOCAB]
    words = [slice(*pair) for pair in pairwise(edges)]
    parts = [(part, lambda states, part=part: size * states @ head[part].T) for part in words]
    got = label_losses(hidden, labels, parts, chunk_bytes=3 * 4 * VOCAB * 2)
    assert_close(got, token_losses(size * hidden @ head.T, labels), rtol=1e-5, atol=1e-5 * size)


@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(1, VOCAB - 1), unique=True, max_size=3),
    positions=st.integers(1, 9),
    cap=st.sampled_from([None, 2.0]),
)
def test_the_way_back_to_the_states_is_autograds(cuts: list[int], positions: int, cap: float | None) -> None:
    hidden, labels, head = hidden_and_labels(2, positions)
    weights = torch.arange(1.0, 1 + 2 * positions).view(2, positions)

    def logits_of(states: Tensor, words: slice) -> Tensor:
        logits = states @ head[words].T
        return logits if cap is None else cap * torch.tanh(logits / cap)

    words = [slice(*pair) for pair in pairwise([0, *sorted(cuts), VOCAB])]
    parts = [(part, lambda states, part=part: logits_of(states, part)) for part in words]
    hidden.requires_grad_()
    losses = label_losses(hidden, labels, parts, chunk_bytes=3 * 4 * VOCAB * 2)
    (got,) = torch.autograd.grad((weights * losses).sum(), hidden)
    whole = logits_of(hidden, slice(0, VOCAB)).log_softmax(dim=-1)
    expected = -weights * whole.gather(-1, labels.expand(2, -1).unsqueeze(-1)).squeeze(-1)
    assert_close(got, torch.autograd.grad(expected.sum(), hidden)[0], rtol=1e-4, atol=1e-4)


def test_a_vocabulary_larger_than_a_chunk_still_goes_one_token_at_a_time() -> None:
    assert loss.chunk_tokens(10**9, 2, 64 * MIB) == 1


@settings(max_examples=20)
@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_row_sums_are_sums_over_each_rows_positions(rows: list[int]) -> None:
    values = torch.arange(2.0 * len(rows)).reshape(2, -1)
    got = row_sums(values, torch.tensor(rows), torch.arange(len(rows)), (5, len(rows)))
    for row in range(5):
        mine = [i for i, r in enumerate(rows) if r == row]
        assert_close(got[:, row], values[:, mine].sum(1))


def test_choice_losses_with_differing_numbers_of_options_are_those_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.25], [0.0, 0.0, 3.0, 1.0, 2.0]])
    table = option_table(scores, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2]), (2, 3))
    assert table[0].tolist() == [[1.0, 2.0, -torch.inf], [-1.0, 0.5, 0.25]]
    answer = torch.tensor([1, 0])
    expected = torch.stack(
        [torch.stack([F.cross_entropy(s[:2], answer[0]), F.cross_entropy(s[2:], answer[1])]) for s in scores]
    )
    assert_close(choice_losses(table, answer), expected)


def test_a_single_option_costs_nothing() -> None:
    table = option_table(torch.tensor([[-7.0, 1.0, 2.0]]), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), (2, 2))
    assert choice_losses(table, torch.tensor([0, 1]))[0, 0] == 0.0
