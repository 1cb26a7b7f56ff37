"""Metrics of an evaluation and how far they can be trusted: intervals of 95 %."""

import numpy as np
from numpy.typing import NDArray

Z = 1.959964  # the normal distribution's 97.5 % point
N_RESAMPLES = 2000  # of the bootstrap: the interval's ends then vary by some 2 % of its width

Interval = tuple[float, float]


def mean_interval(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Interval:
    """The interval of a weighted mean, examples being drawn independently; (n,) values and weights.

    Normal approximation; the variance is that of a ratio estimator (Cochran, Sampling Techniques, 6.4).
    """
    n, total = len(values), float(weights.sum())
    mean = float(weights @ values) / total
    if n < 2:
        return mean, mean
    spread = float(np.square(weights * (values - mean)).sum()) * n / (n - 1)
    half = Z * spread**0.5 / total
    return mean - half, mean + half


def share_interval(n_right: int, n: int) -> Interval:
    """The interval of a share. Source: Wilson, 1927: it holds for few examples and near 0 and 1 as well."""
    share = n_right / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def confusion(right: NDArray[np.int64], predicted: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often each class (row) was taken for each (column); (n,) and (n,) give (classes, classes)."""
    n_classes = int(max(right.max(), predicted.max())) + 1
    table = np.zeros((n_classes, n_classes))
    np.add.at(table, (right, predicted), 1)
    return table


def macro_f1(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over classes of 2 TP / (2 TP + FP + FN); (..., classes, classes) gives (...).

    A class that is neither there nor predicted does not count, as in scikit-learn.
    """
    true = np.diagonal(table, axis1=-2, axis2=-1)
    seen = table.sum(-1) + table.sum(-2)  # 2 TP + FP + FN
    f1 = np.divide(2 * true, seen, out=np.zeros_like(true), where=seen > 0)
    return f1.sum(-1) / np.maximum((seen > 0).sum(-1), 1)


def macro_f1_interval(table: NDArray[np.float64], *, seed: int = 0) -> Interval:
    """The percentile bootstrap's interval: drawing examples anew is drawing the table's cells anew."""
    n = int(table.sum())
    generator = np.random.Generator(np.random.Philox(seed))
    drawn = generator.multinomial(n, (table / n).ravel(), size=N_RESAMPLES)
    low, high = np.percentile(macro_f1(drawn.reshape(-1, *table.shape).astype(float)), (2.5, 97.5))
    return float(low), float(high)
