"""A row as tokens: the ids, and which of them are learned.

The token at position t is predicted from those before it, so position 0 is never a label.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row of a forward pass."""

    input_ids: NDArray[np.int64]  # (tokens,)
    is_label: NDArray[np.bool_]  # (tokens,)


def labelled_from(start: int, input_ids: Sequence[int] | NDArray[np.int64]) -> TokenRow:
    """A row of which every token from `start` on is a label."""
    is_label = np.arange(len(input_ids)) >= max(start, 1)
    return TokenRow(np.asarray(input_ids, dtype=np.int64), is_label)


def last_labels(row: TokenRow) -> TokenRow:
    """The row with the last stretch of its labels alone: an assistant's last turn."""
    labels = np.flatnonzero(row.is_label)
    breaks = np.flatnonzero(np.diff(labels) > 1)
    if breaks.size == 0:
        return row
    return TokenRow(row.input_ids, row.is_label & (np.arange(len(row.is_label)) > labels[breaks[-1]]))


def label_runs(row: TokenRow) -> list[tuple[NDArray[np.int64], bool]]:
    """The row in stretches of tokens that are all labels, or all none."""
    edges = np.flatnonzero(np.diff(row.is_label)) + 1
    parts = np.split(row.input_ids, edges)
    starts = [0, *edges.tolist()]
    return [(part, bool(row.is_label[start])) for part, start in zip(parts, starts, strict=True)]


def n_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """How many leading items two sequences have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(first), len(second)))
