"""Which examples each step sees: the seed, the step's number and, where they are grouped, the lengths decide."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agzo_edge.config import RunConfig
from agzo_edge.numerics.noise import raw_words

ORDER_LAYER = 2**62  # a layer no model has: the order shares no random word with any layer's noise
GROUP_STEPS = 64  # steps among which examples are grouped; more leaves little less padding (benchmarks/padding.py)

Lengths = Sequence[int] | Mapping[int, int] | NDArray[np.integer[Any]]


def chosen_examples(
    lengths: NDArray[np.integer[Any]],  # (examples,) tokens, or bytes
    *,
    step: int,
    config: RunConfig,
) -> list[int]:
    """The indices of the examples of a step, as the settings say."""
    if config.group_by_length:
        return grouped_examples_of_step(lengths, step=step, batch_size=config.batch_size, seed=config.seed)
    return examples_of_step(len(lengths), step=step, batch_size=config.batch_size, seed=config.seed)


def examples_of_step(n_examples: int, *, step: int, batch_size: int, seed: int) -> list[int]:
    """The indices of the examples of a step, steps counted from 0.

    The epochs follow each other without a gap: each is all examples once, in a fresh order, and a
    step's batch may reach over its end, or over several when it is larger than the data.
    """
    chosen: list[int] = _examples_at(np.arange(step * batch_size, (step + 1) * batch_size), n_examples, seed).tolist()
    return chosen


def grouped_examples_of_step(
    lengths: NDArray[np.integer[Any]],  # (examples,) tokens, or bytes
    *,
    step: int,
    batch_size: int,
    seed: int,
) -> list[int]:
    """The same, with examples of like length in a step.

    The examples of GROUP_STEPS steps, or of an epoch's where that has fewer, are sorted by their length, cut
    into batches, and the batches put in a random order: those steps together see what they would have seen.
    """
    group_steps = max(1, min(GROUP_STEPS, len(lengths) // batch_size))
    group, place = divmod(step, group_steps)
    first = group * group_steps * batch_size
    members = _examples_at(np.arange(first, first + group_steps * batch_size), len(lengths), seed)
    by_length = members[np.argsort(lengths[members], kind="stable")].reshape(group_steps, batch_size)
    words = raw_words(group_steps, seed=seed, step=group, layer=ORDER_LAYER + 1, first_example=0, n_examples=1)
    batch: list[int] = by_length[np.argsort(words[0], kind="stable")[place]].tolist()
    return batch


def _examples_at(positions: NDArray[np.int64], n_examples: int, seed: int) -> NDArray[np.int32]:
    """The examples at ascending positions of the endless sequence of epochs."""
    epochs, places = np.divmod(positions, n_examples)
    parts = [_epoch_order(n_examples, int(epoch), seed)[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def _epoch_order(n_examples: int, epoch: int, seed: int) -> NDArray[np.int32]:  # (examples,)
    """A permutation: the ranks of raw random words, which outlive numpy's versions as its shuffles do not."""
    words = raw_words(n_examples, seed=seed, step=epoch, layer=ORDER_LAYER, first_example=0, n_examples=1)
    return np.argsort(words[0], kind="stable").astype(np.int32)


def padding_share(lengths: Lengths, batches: Iterable[Sequence[int]]) -> float:
    """The share of padding in batches, given as lists of examples; `lengths` are the tokens of each's longest row."""
    tokens = padded = 0
    for batch in batches:
        of_batch = np.asarray([lengths[index] for index in batch])
        tokens += int(of_batch.sum())
        padded += int(of_batch.max()) * len(of_batch)
    return 1 - tokens / padded if padded else 0.0
