"""Which examples a step sees."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.train.order import GROUP_STEPS, examples_of_step, grouped_examples_of_step, padding_share


@given(
    n_examples=st.integers(1, 30),
    batch_size=st.integers(1, 50),
    n_steps=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_epoch_holds_each_example_once_without_gaps(n_examples, batch_size, n_steps, seed) -> None:
    order = [
        index
        for step in range(n_steps)
        for index in examples_of_step(n_examples, step=step, batch_size=batch_size, seed=seed)
    ]
    assert len(order) == n_steps * batch_size
    for first in range(0, len(order) - n_examples + 1, n_examples):
        assert sorted(order[first : first + n_examples]) == list(range(n_examples))


def test_the_order_is_the_seeds_and_the_epochs_alone() -> None:
    def epoch(step: int, seed: int) -> list[int]:
        return examples_of_step(50, step=step, batch_size=50, seed=seed)

    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(epoch(step, seed)) for step in range(3) for seed in range(3)}) == 9
    first, second = (examples_of_step(50, step=step, batch_size=25, seed=1) for step in (2, 3))
    assert first + second == epoch(1, 1)  # whatever the batch size, and whatever was asked before
    assert examples_of_step(8, step=0, batch_size=8, seed=0) == ORDER_OF_SEED_0


ORDER_OF_SEED_0 = [2, 4, 6, 0, 3, 5, 1, 7]  # a journal's replay depends on it: it must never change


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    group=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_grouped_steps_together_see_what_plain_ones_would(lengths, batch_size, group, seed) -> None:
    group_steps = max(1, min(GROUP_STEPS, len(lengths) // batch_size))
    steps = range(group * group_steps, (group + 1) * group_steps)
    key = {"batch_size": batch_size, "seed": seed}
    plain = [i for step in steps for i in examples_of_step(len(lengths), step=step, **key)]
    grouped = [i for step in steps for i in grouped_examples_of_step(np.array(lengths), step=step, **key)]
    assert sorted(grouped) == sorted(plain)


def test_grouping_leaves_little_padding_and_the_batches_in_no_order_of_length() -> None:
    lengths = np.random.Generator(np.random.Philox(0)).geometric(0.02, size=1000)
    plain = [examples_of_step(1000, step=step, batch_size=16, seed=0) for step in range(62)]
    grouped = [grouped_examples_of_step(lengths, step=step, batch_size=16, seed=0) for step in range(62)]
    assert padding_share(lengths, plain) > 0.6
    assert padding_share(lengths, grouped) < 0.1
    longest = [int(lengths[batch].max()) for batch in grouped]
    assert abs(np.corrcoef(range(62), longest)[0, 1]) < 0.3


def test_padding_is_what_fills_the_batches_up() -> None:
    assert padding_share([1, 3, 2], [[0, 1], [2]]) == pytest.approx(2 / 8)
    assert padding_share([4, 4], [[0, 1]]) == 0
    assert padding_share([], []) == 0
