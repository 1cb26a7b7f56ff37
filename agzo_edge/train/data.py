"""Examples, and batches of them as tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agzo_edge.config import RunConfig
from agzo_edge.data_config import Objective
from agzo_edge.model.device import sent
from agzo_edge.train.length import longest_tokens
from agzo_edge.train.template import Asking
from agzo_edge.train.tokens import TokenRow

Sample = tuple[tuple[str, bool], ...]  # stretches of text, and whether each is learned


ROW_BYTES, EXAMPLE_BYTES = 400, 220  # of Python's objects, beside the numbers (measured: CPython 3.11, numpy 2)
NO_FIELDS: Mapping[str, Any] = MappingProxyType({})  # one for all examples: there may be a million


@dataclass(frozen=True, slots=True)
class Example:
    """What one loss is computed from."""

    rows: tuple[TokenRow, ...]  # one for lm, one for each option for choice
    answer: int  # the right option's index; 0 for lm
    place: str  # "notes.jsonl:12"
    fields: Mapping[str, Any] = field(default_factory=lambda: NO_FIELDS)  # of the row, for a reward to read

    @property
    def label_tokens(self) -> int:
        """The tokens that are learned, or scored, in all rows together."""
        return sum(int(row.is_label.sum()) for row in self.rows)


@dataclass(frozen=True)
class DataReport:
    """What became of a source's rows."""

    format: str  # one of formats.Format
    rows_read: int
    rows_used: int
    rows_truncated: int  # among the used
    rows_dropped: int  # too long, or without a label token
    label_tokens: int  # of the rows trained on, or scored
    longest_tokens: int  # of the rows used
    tokens: int = 0  # of all rows used, prompts and options included
    padding_share: float = 0.0  # of what goes through the model: what fills batches up to their longest row
    rows_per_example: int = 1  # the most
    streamed: bool = False  # rows_read are all lines of the file; all else is of those that the run uses
    rows_held_back: int = 0  # of those used: watched, and not trained on
    all_checked: bool = True  # otherwise other rows may be as long as longest_tokens, which is the limit


@dataclass(frozen=True)
class ExampleSet:
    """All examples of a source, in its order."""

    examples: Sequence[Example]  # to train on, or to score: at hand, or made of a large file's rows one by one
    report: DataReport
    sha256: str  # of token ids, labels and answers: equal where the same is learned; of a large file its bytes
    sample: Sample = ()  # the first example, for a person to check
    asking: Asking | None = None  # how prompts are put to the model, for whoever asks it afterwards
    largest: Sequence[Example] = ()  # those that take most of a pass, where not all are at hand
    line_bytes: NDArray[np.int32] | None = None  # (examples,), where their tokens are not known
    held_back: Sequence[Example] = ()  # from training, to see harm by: train/undo.py

    @cached_property
    def lengths(self) -> NDArray[np.integer[Any]]:
        """(training examples,): the tokens of each one's longest row, or the bytes of its line; like goes with like."""
        if self.line_bytes is not None:
            return self.line_bytes
        return np.array([longest_tokens(example.rows) for example in self.examples])

    @property
    def rows(self) -> Iterator[TokenRow]:
        """All rows that go through the model, those held back as well."""
        return (row for example in chain(self.examples, self.held_back) for row in example.rows)

    @property
    def most_label_tokens(self) -> int:
        """The tokens that are learned, or scored, of the row that has most."""
        return max(int(row.is_label.sum()) for row in self.rows)

    @property
    def n_bytes(self) -> int:
        """What the examples take in memory: tokens and labels, and the objects that hold them."""
        in_rows = sum(row.input_ids.nbytes + row.is_label.nbytes + ROW_BYTES for row in self.rows)
        return in_rows + EXAMPLE_BYTES * (len(self.examples) + len(self.held_back))


@dataclass(frozen=True)
class Batch:
    """The rows of some examples, padded on the right."""

    input_ids: Tensor  # (rows, tokens) int64
    attention_mask: Tensor  # (rows, tokens) int64, 0 at padding
    is_label: Tensor  # (rows, tokens) bool, never at position 0
    predicts: Tensor  # (2, labels) int64: the rows and positions whose states predict a label, the one after each
    example: Tensor  # (rows,) int64, the example a row belongs to, counted within this batch
    option: Tensor  # (rows,) int64, which of its example's rows it is
    options_shape: tuple[int, int]  # examples, and the most rows that one has
    answer: Tensor  # (examples,) int64, the right one of an example's rows
    weights: Tensor  # (examples,) float32, shares of the step's whole batch, which sum to 1
    first_example: int  # number of this batch's first example within the step's
    places: tuple[str, ...]  # for each example: "notes.jsonl:12"
    fields: tuple[Mapping[str, Any], ...] = ()  # for each example, for a reward to read

    @property
    def is_predicting(self) -> Tensor:  # (rows, tokens) bool
        """Where the next token is a label."""
        return F.pad(self.is_label[:, 1:], (0, 1))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=sent(self.input_ids, device),
            attention_mask=sent(self.attention_mask, device),
            is_label=sent(self.is_label, device),
            predicts=sent(self.predicts, device),
            example=sent(self.example, device),
            option=sent(self.option, device),
            answer=sent(self.answer, device),
            weights=sent(self.weights, device),
        )


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up; any would do, because padding is masked out everywhere."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


def collate(examples: Sequence[Example], *, pad_id: int, objective: Objective) -> Batch:
    """All of a step's examples in one batch."""
    return next(micro_batches(examples, micro_batch_size=len(examples), pad_id=pad_id, objective=objective))


def micro_batches(
    examples: Sequence[Example],  # of one step
    *,
    micro_batch_size: int,  # examples in a batch; the last may hold fewer
    pad_id: int,
    objective: Objective,
) -> Iterator[Batch]:
    """A step's examples in batches; all their weights sum to 1, so weighted losses add up to the step's."""
    assert examples
    assert micro_batch_size >= 1
    weights = _weights(examples, objective)
    for first in range(0, len(examples), micro_batch_size):
        part = slice(first, first + micro_batch_size)
        yield _batch(examples[part], weights[part], first_example=first, pad_id=pad_id)


def batches_of(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> list[Batch]:
    """`examples` in the micro-batches that a run takes them in."""
    size, pad_id = config.micro_batch_size or config.batch_size, pad_id_of(tokenizer)
    return list(micro_batches(examples, micro_batch_size=size, pad_id=pad_id, objective=config.objective))


def _weights(examples: Sequence[Example], objective: Objective) -> NDArray[np.float32]:
    """Each example's share of the batch: of its label tokens for lm, an equal one for choice."""
    tokens = np.array([example.label_tokens if objective == "lm" else 1 for example in examples])
    return (tokens / tokens.sum()).astype(np.float32)


def _batch(
    examples: Sequence[Example],
    weights: NDArray[np.float32],  # (examples,)
    *,
    first_example: int,
    pad_id: int,
) -> Batch:
    rows = [row for example in examples for row in example.rows]
    shape = (len(rows), longest_tokens(rows))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    is_label = np.zeros(shape, dtype=np.bool_)
    for i, row in enumerate(rows):
        n_tokens = len(row.input_ids)
        input_ids[i, :n_tokens] = row.input_ids
        attention_mask[i, :n_tokens] = 1
        is_label[i, :n_tokens] = row.is_label
    assert not is_label[:, 0].any()
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        is_label=torch.from_numpy(is_label),
        predicts=torch.from_numpy(np.stack(is_label[:, 1:].nonzero())),  # here: a GPU would have to be waited for
        example=torch.tensor([i for i, example in enumerate(examples) for _ in example.rows]),
        option=torch.tensor([i for example in examples for i in range(len(example.rows))]),
        options_shape=(len(examples), max(len(example.rows) for example in examples)),
        answer=torch.tensor([example.answer for example in examples]),
        weights=torch.from_numpy(weights),
        first_example=first_example,
        places=tuple(example.place for example in examples),
        fields=tuple(example.fields for example in examples),
    )


def longest_examples(data: ExampleSet, n: int) -> list[Example]:
    """The `n` examples with the longest rows, or with most of them: the worst batch that a step may meet.

    With fewer than `n` some are taken twice, as in a step.
    """

    def size(example: Example) -> int:
        return len(example.rows) * longest_tokens(example.rows)

    by_tokens = sorted(data.largest or chain(data.examples, data.held_back), key=size)
    return [by_tokens[-1 - i % len(by_tokens)] for i in range(n)]
