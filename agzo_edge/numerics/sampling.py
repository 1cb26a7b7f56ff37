"""Tokens drawn by numbers that anyone can draw again."""

import numpy as np
import torch
from torch import Tensor

from agzo_edge.numerics.noise import raw_words

SAMPLING_LAYERS = 2**61  # added to a position's number: no layer's noise, no data order shares its words


def uniform_numbers(n_examples: int, *, seed: int, step: int, position: int, first_example: int) -> Tensor:
    """A number in (0, 1) for each example's token at a position of its answer: (examples,) float64."""
    layer = SAMPLING_LAYERS + position
    words = raw_words(1, seed=seed, step=step, layer=layer, first_example=first_example, n_examples=n_examples)
    return torch.from_numpy(((words[:, 0] >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def drawn_tokens(
    logits: Tensor,  # (rows, vocabulary)
    numbers: Tensor,  # (rows,) float64 in (0, 1)
) -> Tensor:  # (rows,) int64
    """The tokens at which the cumulated probabilities pass the numbers.

    Rows that share a number and are alike draw alike tokens: what differs then, differs for the signs' sake.
    """
    cumulated = logits.float().softmax(-1).double().cumsum(-1)
    total = cumulated[:, -1:]  # 1 but for rounding
    tokens = torch.searchsorted(cumulated, numbers.unsqueeze(1) * total, right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[1] - 1)
