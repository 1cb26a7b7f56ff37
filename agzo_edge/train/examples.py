"""The examples of a source: its rows as tokens, with an account of what became of each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from agzo_edge.errors import DataError, numbered
from agzo_edge.train.data import DataReport, Example, ExampleSet
from agzo_edge.train.formats import Format, Objective, SoundRow, answer_index, checked_rows
from agzo_edge.train.length import Overlong, fitted_rows, longest_tokens
from agzo_edge.train.rows import BrokenRow
from agzo_edge.train.source import Split, read_rows
from agzo_edge.train.template import TokenRow, require_chat_template, token_rows


def load_examples(
    source: str,  # a file, a directory, or a data set of the hub
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: Objective,
    max_seq_length: int,  # tokens
    overlong: Overlong,
    mask_prompt: bool,
    split: Split = "train",  # of a directory or a hub data set; a file is read whole
) -> ExampleSet:
    """The examples of a source. Raises DataError once, with the faults of all its rows."""
    tally = _Tally()
    for row in checked_rows(read_rows(source, split=split), objective):
        tally.rows_read += 1
        if isinstance(row, BrokenRow):
            tally.faults.append(str(row))
            continue
        if row.format == "messages":
            require_chat_template(tokenizer, source)
        try:
            rows = token_rows(row.fields, row.format, tokenizer, mask_prompt=mask_prompt)
            tally.longest_tokens = max(tally.longest_tokens, longest_tokens(rows))
            fitted = fitted_rows(rows, limit=max_seq_length, overlong=overlong, bos_id=tokenizer.bos_token_id)
        except DataError as error:
            tally.faults.append(f"{row.place}: {error}")
            continue
        tally.add(row, fitted, truncated=fitted is not rows)
    if fault := tally.complaint(max_seq_length):
        raise DataError(f"{source}: {fault}")
    return ExampleSet(tally.examples, tally.report(), _sha256(tally.examples))


@dataclass
class _Tally:
    """What has become of the rows read so far."""

    examples: list[Example] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    format: Format = "text"
    rows_read: int = 0
    rows_truncated: int = 0
    longest_tokens: int = 0  # before anything is cut

    def add(self, row: SoundRow, rows: tuple[TokenRow, ...], *, truncated: bool) -> None:
        """Take a row's tokens in; no tokens mean that it was dropped."""
        self.format = row.format
        if not rows:
            return
        self.rows_truncated += truncated
        answer = answer_index(row.fields["options"], row.fields["answer"]) if row.format == "choice" else 0
        assert answer is not None  # checked_rows let it through
        self.examples.append(Example(rows, answer, row.place))

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

    def report(self) -> DataReport:
        """The account of a source that was read to its end."""
        return DataReport(
            format=self.format,
            rows_read=self.rows_read,
            rows_used=len(self.examples),
            rows_truncated=self.rows_truncated,
            rows_dropped=self.rows_read - len(self.examples),
            label_tokens=sum(example.label_tokens for example in self.examples),
            longest_tokens=max(longest_tokens(example.rows) for example in self.examples),
        )


def _sha256(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.answer} {[len(row.input_ids) for row in example.rows]}\n".encode())
        for row in example.rows:
            digest.update(row.input_ids.astype("<i8", copy=False).tobytes() + row.is_label.tobytes())
    return digest.hexdigest()
