"""The loss of next-token prediction, in float32, at label positions only, over chunks.

The whole (tokens, vocabulary) matrix of logits never exists: at a vocabulary of 151,936 it would take
594 MiB for 1,024 tokens, more than a small model's weights.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agzo_edge.numerics.products import in_blocks, whole_blocks

GRADIENT_PIECES = 2  # a chunk's pieces where a gradient is asked for

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
        if hidden.requires_grad:  # the way back has the logits and their gradient, of a smaller chunk
            size = -(-min(size, labels.shape[0]) // GRADIENT_PIECES)
        if in_blocks(hidden):
            size = max(1, whole_blocks(size * hidden.shape[0]) // hidden.shape[0])
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
    """`part_scores` of a chunk of states (streams, positions, hidden_size)."""
    if not hidden.requires_grad:
        return part_scores(_logits(head, hidden), labels, first_word)
    found: tuple[Tensor, Tensor] = _Scores.apply(hidden, labels, head, first_word)
    return found


def _logits(head: Head, hidden: Tensor) -> Tensor:
    """(streams, positions, words). Flat: of a slice with a stream dimension torch makes batches and copies the head."""
    return head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


class _Scores(torch.autograd.Function):
    """`part_scores` of a chunk with a way back, on which the logits are made again rather than kept."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, labels: Tensor, head: Head, first_word: int) -> tuple[Tensor, Tensor]:
        """The log-sum-exp and the label's logit."""
        context.save_for_backward(hidden, labels)
        context.head, context.first_word = head, first_word
        return part_scores(_logits(head, hidden), labels, first_word)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Of the logits: softmax times the log-sum-exp's gradient, and the label's at its place; then of the states."""
        of_sum, of_label = (gradient.unsqueeze(-1) for gradient in gradients)
        hidden, labels = context.saved_tensors
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = _logits(context.head, hidden)
        index, is_here = _places(logits, labels, context.first_word)
        of_logits = logits.detach().float().softmax(dim=-1).mul_(of_sum)
        of_logits.scatter_add_(-1, index, torch.where(is_here, of_label, 0.0))
        (gradient,) = torch.autograd.grad(logits, hidden, of_logits.to(logits.dtype))
        return gradient, None, None, None


def part_scores(
    logits: Tensor,  # (streams, positions, words)
    labels: Tensor,  # (positions,), in the whole vocabulary
    first_word: int,
) -> tuple[Tensor, Tensor]:  # (streams, positions) float32 each
    """The log-sum-exp over these words, and the label's logit, 0 where the label is not among them."""
    logits = logits.float()
    index, is_here = _places(logits, labels, first_word)
    return logits.logsumexp(dim=-1), torch.where(is_here, logits.gather(-1, index), 0.0).squeeze(-1)


def _places(logits: Tensor, labels: Tensor, first_word: int) -> tuple[Tensor, Tensor]:
    """Each label's index among these words (streams, positions, 1), and whether it is there: (positions, 1)."""
    place = labels - first_word
    index = place.clamp(0, logits.shape[-1] - 1).expand(logits.shape[0], -1)
    return index.unsqueeze(-1), ((place >= 0) & (place < logits.shape[-1])).unsqueeze(-1)


def row_sums(
    values: Tensor,  # (streams, positions)
    row: Tensor,  # (positions,) int64: the row of each position
    token: Tensor,  # (positions,) int64: its place there
    shape: tuple[int, int],  # (rows, tokens)
) -> Tensor:  # (streams, rows)
    """The sum over each row's positions, in one order always: `index_add` on a GPU adds as threads come by."""
    return _table(values, row, token, shape, filled_with=0.0).sum(-1)


def option_table(
    scores: Tensor,  # (streams, rows): an option's log-likelihood
    example: Tensor,  # (rows,) int64: the example of each row
    option: Tensor,  # (rows,) int64: which of its example's options it is
    shape: tuple[int, int],  # (examples, most options)
) -> Tensor:  # (streams, examples, most options), -inf where an example has fewer
    """The options' scores side by side, example by example."""
    return _table(scores, example, option, shape, filled_with=-torch.inf)


def _table(values: Tensor, row: Tensor, column: Tensor, shape: tuple[int, int], *, filled_with: float) -> Tensor:
    """The values (streams, n) at their places, no two at the same, in a table (streams, *shape)."""
    table = values.new_full((values.shape[0], *shape), filled_with)
    stream = torch.arange(values.shape[0], device=values.device).unsqueeze(-1)
    return table.index_put((stream, row, column), values)


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
