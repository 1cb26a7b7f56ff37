"""Metrics against sums by hand, and intervals against what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.numerics.scores import confusion, macro_f1, macro_f1_interval, mean_interval, share_interval

answers = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


def dense_macro_f1(right: np.ndarray, predicted: np.ndarray) -> float:
    """Precision and recall of each class that is there or predicted, one by one."""
    scores = []
    for label in sorted({*right.tolist(), *predicted.tolist()}):
        hits = sum(a == b == label for a, b in zip(right, predicted, strict=True))
        precision = hits / max(1, sum(predicted == label))
        recall = hits / max(1, sum(right == label))
        scores.append(0.0 if hits == 0 else 2 * precision * recall / (precision + recall))
    return sum(scores) / len(scores)


@given(answers)
def test_macro_f1_is_the_mean_of_each_classes_own(pairs: list[tuple[int, int]]) -> None:
    right, predicted = np.array(pairs).T
    assert float(macro_f1(confusion(right, predicted))) == pytest.approx(dense_macro_f1(right, predicted))


@given(answers)
def test_a_confusion_table_holds_every_example_once(pairs: list[tuple[int, int]]) -> None:
    right, predicted = np.array(pairs).T
    table = confusion(right, predicted)
    assert table.sum() == len(pairs)
    assert np.trace(table) == sum(right == predicted)


@pytest.mark.parametrize(("n_right", "low", "high"), [(0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)])
def test_the_interval_of_a_share_is_wilsons(n_right: int, low: float, high: float) -> None:
    assert share_interval(n_right, 10) == pytest.approx((low, high), abs=1e-4)  # Wilson's formula, by hand


def test_the_interval_of_equal_weights_is_that_of_a_plain_mean() -> None:
    values = np.array([1.0, 2.0, 4.0, 7.0])
    half = 1.959964 * values.std(ddof=1) / 2
    assert mean_interval(values, np.full(4, 3.0)) == pytest.approx((values.mean() - half, values.mean() + half))
    assert mean_interval(values[:1], np.ones(1)) == (1.0, 1.0)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.Generator(np.random.Philox(5))
    held = {"mean": 0, "share": 0}
    for _ in range(400):
        weights = generator.integers(1, 20, 80).astype(float)
        low, high = mean_interval(generator.exponential(size=80), weights)
        held["mean"] += low <= 1.0 <= high
        low, high = share_interval(int(generator.binomial(60, 0.9)), 60)
        held["share"] += low <= 0.9 <= high
    assert all(0.90 < count / 400 < 0.99 for count in held.values()), held


def test_the_bootstrap_surrounds_the_score_and_narrows_with_the_examples() -> None:
    table = np.array([[30.0, 10.0], [5.0, 55.0]])
    low, high = macro_f1_interval(table)
    assert low < float(macro_f1(table)) < high
    narrow = macro_f1_interval(100 * table)
    assert narrow[1] - narrow[0] < (high - low) / 5
    assert macro_f1_interval(table) == (low, high)  # the seed is in the call
