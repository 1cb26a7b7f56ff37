"""The loss of next-token prediction, in float32, at label positions only, over chunks.

The whole (tokens, vocabulary) matrix of logits never exists: at a vocabulary of 151,936 it would take
594 MiB for 1,024 tokens, more than a small model's weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LOGITS_CHUNK_BYTES = 64 * 1024**2  # float32 logits of one chunk; larger chunks gain nothing (measured)


def chunk_tokens(vocab_size: int, n_streams: int) -> int:
    """Label positions in a chunk so that its logits stay within LOGITS_CHUNK_BYTES."""
    return max(1, LOGITS_CHUNK_BYTES // (4 * vocab_size * n_streams))


def label_losses(
    hidden: Tensor,  # (streams, positions, hidden_size): the states that predict a label
    labels: Tensor,  # (positions,) int64
    head: Callable[[Tensor], Tensor],  # (..., hidden_size) -> (..., vocabulary) logits
    *,
    vocab_size: int,
) -> Tensor:  # (streams, positions) float32
    """The negative log-likelihood of each label, in each stream.

    The streams (the two signs of a perturbation) share every chunk, so that both meet the same kernels
    and the same order of summation.
    """
    size = chunk_tokens(vocab_size, hidden.shape[0])
    losses = [
        token_losses(head(hidden[:, start : start + size]), labels[start : start + size])
        for start in range(0, labels.shape[0], size)
    ]
    return torch.cat(losses, dim=1)


def token_losses(
    logits: Tensor,  # (streams, positions, vocabulary)
    labels: Tensor,  # (positions,)
) -> Tensor:  # (streams, positions) float32
    """−log softmax at the label, by log-sum-exp in float32."""
    logits = logits.float()
    index = labels.expand(logits.shape[0], -1).unsqueeze(-1)
    return logits.logsumexp(dim=-1) - logits.gather(-1, index).squeeze(-1)


def row_sums(
    values: Tensor,  # (streams, positions)
    row: Tensor,  # (positions,) int64: the row of each position
    n_rows: int,
) -> Tensor:  # (streams, n_rows)
    """The sum over each row's positions."""
    zeros = torch.zeros(values.shape[0], n_rows, dtype=values.dtype, device=values.device)
    return zeros.index_add(1, row, values)


def option_table(
    scores: Tensor,  # (streams, rows): an option's log-likelihood
    example: Tensor,  # (rows,) int64, ascending: the example of each row
    n_examples: int,
) -> Tensor:  # (streams, examples, most options), -inf where an example has fewer
    """The options' scores side by side, example by example."""
    counts = torch.bincount(example, minlength=n_examples)
    first = counts.cumsum(0) - counts  # (examples,): the row of the example's first option
    place = torch.arange(example.shape[0], device=example.device) - first[example]
    table = scores.new_full((scores.shape[0], n_examples, int(counts.max())), -torch.inf)
    stream = torch.arange(scores.shape[0], device=scores.device).unsqueeze(-1)
    return table.index_put((stream, example, place), scores)


def choice_losses(
    table: Tensor,  # (streams, examples, options), -inf where there is none
    answer: Tensor,  # (examples,) int64: index of the right option among the example's rows
) -> Tensor:  # (streams, examples)
    """The cross-entropy between each example's options: −log softmax over them at the right one."""
    right = answer.expand(table.shape[0], -1).unsqueeze(-1)
    return table.logsumexp(dim=-1) - table.gather(-1, right).squeeze(-1)
