"""The examples of a source: its rows as tokens, with an account of what became of each."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from agzo_edge.config import RunConfig
from agzo_edge.errors import DataError, numbered
from agzo_edge.train.conversation import require_chat_template
from agzo_edge.train.data import DataReport, Example, ExampleSet, Sample
from agzo_edge.train.formats import SoundRow, answer_index, checked_row
from agzo_edge.train.length import fitted_prompt, fitted_rows, longest_tokens
from agzo_edge.train.mapping import mapped_row
from agzo_edge.train.order import chosen_examples, padding_share
from agzo_edge.train.plain import text_rows
from agzo_edge.train.rows import BrokenRow, RawRow
from agzo_edge.train.source import Split, read_rows
from agzo_edge.train.template import needs_chat_template, token_rows
from agzo_edge.train.tokens import TokenRow, label_runs


def load_examples(
    source: str,  # a file, a directory, or a data set of the hub
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    split: Split = "train",  # of a directory or a hub data set; a file is read whole
) -> ExampleSet:
    """The examples of a source. Raises DataError once, with the faults of all its rows."""
    maker = ExampleMaker(source, tokenizer, config)
    rows = text_rows(
        read_rows(source, split=split), tokenizer, max_tokens=config.max_seq_length, line_pattern=config.line_pattern
    )
    tally = _Tally()
    for row in rows:
        tally.add(row.place, maker.made(row))
    if fault := tally.complaint(config.max_seq_length):
        raise DataError(f"{source}: {fault}")
    examples = tally.examples
    report = tally.report(maker.format, padding=_padding(examples, config, split=split))
    return ExampleSet(examples, report, _sha256(examples), sample_of(examples[0], tokenizer))


@dataclass(frozen=True)
class Made:
    """What became of a row: an example, or a fault, or neither when it was dropped."""

    example: Example | None = None
    fault: str = ""
    truncated: bool = False
    longest_tokens: int = 0  # before anything was cut


class ExampleMaker:
    """Makes examples of a source's raw rows, as the settings say."""

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.config = config
        self._first: SoundRow | None = None  # the others must have its format

    @property
    def format(self) -> str:
        """The format of the source's rows, once one was sound."""
        return self._first.format if self._first else ""

    def made(self, row: RawRow | BrokenRow) -> Made:
        """The example of a row. Raises DataError for what would be wrong with every row."""
        mapped = row if isinstance(row, BrokenRow) else mapped_row(row, self.config)
        if isinstance(mapped, BrokenRow):
            return Made(fault=mapped.fault)
        sound = checked_row(mapped, self.config.objective, first=self._first)
        if isinstance(sound, str):
            return Made(fault=sound)
        self._first = self._first or sound
        if needs_chat_template(sound.fields, sound.format):
            require_chat_template(self.tokenizer, self.source)
        try:
            rows = self._token_rows(sound)
        except DataError as error:
            return Made(fault=str(error))
        return self._fitted(sound, rows)

    def _token_rows(self, row: SoundRow) -> tuple[TokenRow, ...]:
        mask_prompt, train_on = self.config.mask_prompt, self.config.train_on
        return token_rows(row.fields, row.format, self.tokenizer, mask_prompt=mask_prompt, train_on=train_on)

    def _fitted(self, row: SoundRow, rows: tuple[TokenRow, ...]) -> Made:
        """The example of a row's tokens, cut or dropped where they are too many."""
        longest = longest_tokens(rows)
        limit, overlong, bos_id = self.config.max_seq_length, self.config.overlong, self.tokenizer.bos_token_id
        try:
            if row.format == "prompt":
                fitted = fitted_prompt(rows[0], limit=limit, overlong=overlong)
            else:
                fitted = fitted_rows(rows, limit=limit, overlong=overlong, bos_id=bos_id)
        except DataError as error:
            return Made(fault=str(error), longest_tokens=longest)
        if not fitted:
            return Made(longest_tokens=longest)
        answer = answer_index(row.fields["options"], row.fields["answer"]) if row.format == "choice" else 0
        assert answer is not None  # checked_row let it through
        fields = row.fields if row.format == "prompt" else {}
        is_cut = longest > limit
        return Made(Example(fitted, answer, row.place, fields), truncated=is_cut, longest_tokens=longest)


@dataclass
class _Tally:
    """What has become of the rows read so far."""

    examples: list[Example] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    rows_read: int = 0
    rows_truncated: int = 0
    longest_tokens: int = 0  # before anything is cut

    def add(self, place: str, made: Made) -> None:
        """Take in what became of a row."""
        self.rows_read += 1
        self.longest_tokens = max(self.longest_tokens, made.longest_tokens)
        self.rows_truncated += made.truncated
        if made.fault:
            self.faults.append(f"{place}: {made.fault}")
        elif made.example is not None:
            self.examples.append(made.example)

    def complaint(self, limit_tokens: int) -> str:
        """Why these rows cannot be trained on; empty when they can."""
        if self.faults:
            counted = f"{len(self.faults):,} of {self.rows_read:,} rows cannot be used"
            advice = f"\nlonger rows: --max-seq-length {self.longest_tokens}, or --overlong truncate or drop"
            return f"{counted}:\n{numbered(self.faults)}" + advice * (self.longest_tokens > limit_tokens)
        if not self.rows_read:
            return "holds no rows"
        if not self.examples:
            return (
                f"no row is left: all {self.rows_read:,} have over {limit_tokens:,} tokens or no label token "
                f"(the longest has {self.longest_tokens:,}): raise --max-seq-length"
            )
        return ""

    def report(self, row_format: str, *, padding: float) -> DataReport:
        """The account of a source that was read to its end."""
        return DataReport(
            format=row_format,
            rows_read=self.rows_read,
            rows_used=len(self.examples),
            rows_truncated=self.rows_truncated,
            rows_dropped=self.rows_read - len(self.examples),
            label_tokens=sum(example.label_tokens for example in self.examples),
            longest_tokens=max(longest_tokens(example.rows) for example in self.examples),
            tokens=sum(len(row.input_ids) for example in self.examples for row in example.rows),
            padding_share=round(padding, 4),
        )


def sample_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """An example's row, the right one of its options, as text: stretches, and whether each is learned."""
    return tuple((str(tokenizer.decode(ids)), learned) for ids, learned in label_runs(example.rows[example.answer]))


def _padding(examples: Sequence[Example], config: RunConfig, *, split: Split) -> float:
    """The share of padding in the run's steps; of examples that are only scored, in batches of like length."""
    lengths = np.array([longest_tokens(example.rows) for example in examples])
    if split == "train":
        steps = (chosen_examples(lengths, step=step, config=config) for step in range(config.max_steps))
        return padding_share(lengths, steps)
    by_length = np.argsort(lengths, kind="stable").tolist()
    size = config.batch_size
    return padding_share(lengths, (by_length[first : first + size] for first in range(0, len(by_length), size)))


def _sha256(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.answer} {[len(row.input_ids) for row in example.rows]}\n".encode())
        if example.fields:  # a reward may read them all
            digest.update(json.dumps(example.fields, sort_keys=True, default=str).encode())
        for row in example.rows:
            digest.update(row.input_ids.astype("<i8", copy=False).tobytes() + row.is_label.tobytes())
    return digest.hexdigest()
