"""The loss of next-token prediction, in float32, at label positions only, over chunks.

The whole (tokens, vocabulary) matrix of logits never exists: at a vocabulary of 151,936 it would take
594 MiB for 1,024 tokens, more than a small model's weights.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

GRADIENT_PIECES = 8  # a chunk's pieces where a gradient is asked for

Head = Callable[[Tensor], Tensor]  # (..., hidden_size) -> (..., words) logits of some part of the vocabulary


def chunk_tokens(vocab_size: int, n_streams: int, chunk_bytes: int) -> int:
    """Label positions in a chunk so that its float32 logits stay within `chunk_bytes`."""
    return max(1, chunk_bytes // (4 * vocab_size * n_streams))


def label_losses(
    hidden: Tensor,  # (streams, positions, hidden_size): the states that predict a label
    labels: Tensor,  # (positions,) int64
    head_parts: Iterable[tuple[slice, Head]],  # the parts of the vocabulary in order, each with its head
    *,
    chunk_bytes: int,
) -> Tensor:  # (streams, positions) float32
    """The negative log-likelihood of each label, in each stream: log-sum-exp over the vocabulary − the label's logit.

    The streams (the two signs of a perturbation) share every chunk, so that both meet the same kernels
    and the same order of summation. A head that is in one part is the usual case; one that does not fit the
    device comes in several, each fetched once, and the log-sum-exp runs on over them.
    """
    log_sum: Tensor | None = None
    at_label: Tensor | None = None
    for words, head in head_parts:
        size = chunk_tokens(words.stop - words.start, hidden.shape[0], chunk_bytes)
        if hidden.requires_grad:  # the way back has more copies of a chunk: of a smaller one, so that no more is taken
            size = max(1, min(size, labels.shape[0]) // GRADIENT_PIECES)
        starts = range(0, labels.shape[0], size)
        pieces = ((hidden[:, i : i + size], labels[i : i + size]) for i in starts)
        chunks = [_chunk_scores(head, states, wanted, words.start) for states, wanted in pieces]
        part_sum, part_label = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
        log_sum = part_sum if log_sum is None else torch.logaddexp(log_sum, part_sum)
        at_label = part_label if at_label is None else at_label + part_label
    assert log_sum is not None
    assert at_label is not None
    return log_sum - at_label


def _chunk_scores(head: Head, hidden: Tensor, labels: Tensor, first_word: int) -> tuple[Tensor, Tensor]:
    """`part_scores` of a chunk; where a gradient is asked for, its logits are made again rather than kept."""

    def scores(states: Tensor) -> tuple[Tensor, Tensor]:
        # Flat: of a slice with a stream dimension, even of one stream, torch makes batches and copies the head.
        return part_scores(head(states.flatten(0, 1)).unflatten(0, states.shape[:2]), labels, first_word)

    if not hidden.requires_grad:
        return scores(hidden)
    found: tuple[Tensor, Tensor] = checkpoint(scores, hidden, use_reentrant=False, preserve_rng_state=False)
    return found


def part_scores(
    logits: Tensor,  # (streams, positions, words)
    labels: Tensor,  # (positions,), in the whole vocabulary
    first_word: int,
) -> tuple[Tensor, Tensor]:  # (streams, positions) float32 each
    """The log-sum-exp over these words, and the label's logit, 0 where the label is not among them."""
    logits = logits.float()
    place = labels - first_word
    is_here = (place >= 0) & (place < logits.shape[-1])
    index = place.clamp(0, logits.shape[-1] - 1).expand(logits.shape[0], -1).unsqueeze(-1)
    return logits.logsumexp(dim=-1), torch.where(is_here, logits.gather(-1, index).squeeze(-1), 0.0)


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


def preference_losses(
    margins: Tensor,  # (...): by how much the better of two answers is likelier
    *,
    beta: float,
    gamma: float,
) -> Tensor:  # (...)
    """−log σ(β margin − γ) of each pair. Sources: DPO, arXiv 2305.18290, eq. 7; SimPO, arXiv 2405.14734, eq. 6."""
    return F.softplus(gamma - beta * margins)
