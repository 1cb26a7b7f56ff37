"""Training on a file that is too large to be held: rows are read and tokenised when a step needs them.

Which rows a run will use is known before its start, from the seed. Those are looked at then, as all rows of a
smaller file are, and their faults are told together. Of a run that uses more than CHECKED_ROWS the others are
looked at when their step comes: until then each may be as long as a row may be, and the plan counts it so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from agzo_edge.budget.facts import ModelFacts
from agzo_edge.config import RunConfig
from agzo_edge.errors import DataError
from agzo_edge.train.data import Example, ExampleSet
from agzo_edge.train.length import longest_tokens
from agzo_edge.train.maker import ExampleMaker, sample_of
from agzo_edge.train.order import chosen_examples, padding_share
from agzo_edge.train.row_index import RowIndex, row_index
from agzo_edge.train.tally import Made, Tally
from agzo_edge.train.tokens import TokenRow
from agzo_edge.train.undo import watched_lines
from agzo_edge.units import MIB

STREAM_BYTES = 64 * MIB  # of a file; its tokens and their objects would take some ten times as much
CHECKED_ROWS = 50_000  # some ten seconds
MEND = "mend the row, and begin again from the last checkpoint with --adapter"  # the data has changed: no resume


class StreamedExamples(Sequence[Example]):
    """An example for each line of a file; one that is blank or dropped has that of the next line that is not."""

    def __init__(self, file: RowIndex, maker: ExampleMaker) -> None:
        self.file = file
        self.maker = maker

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, number: int) -> Example:  # type: ignore[override]  # nobody asks for a slice
        """The example of a line. Raises DataError when it cannot be used."""
        if number >= len(self):
            raise IndexError(number)  # where an iteration ends
        for line, made in self.tried(number):
            if made.fault:
                raise DataError(f"{self.file.place(line)}: {made.fault}: {MEND}")
            if made.example is not None:
                return made.example
        raise DataError(f"{self.file.path}: every row was dropped: raise --max-seq-length")

    def tried(self, number: int) -> Iterator[tuple[int, Made]]:
        """The lines that are looked at for an example, and what became of each; all are dropped, or the last is not."""
        for line in chain(range(number, len(self)), range(number)):
            row = self.file.row(line)
            if row is not None:
                made = self.maker.made(row)
                yield line, made
                if made.fault or made.example is not None:
                    return


def streamed_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, config: RunConfig, *, facts: ModelFacts | None = None
) -> ExampleSet:
    """The examples of a large JSON Lines file. Raises DataError once, with the faults of all rows looked at."""
    index = row_index(path)
    examples = StreamedExamples(index, ExampleMaker(str(path), tokenizer, config, facts=facts))
    tally = Tally(config.batch_size)
    tokens: dict[int, int] = {}  # of the example of each line that was looked at, 0 where it has none
    tries = chain.from_iterable(map(examples.tried, _used_lines(index, config)))
    for line, made in islice(tries, CHECKED_ROWS):
        if line not in tokens:  # a dropped line may have brought it up before
            tally.add(index.place(line), made)
            tokens[line] = longest_tokens(made.example.rows) if made.example else 0
    room = facts.room_for(config) if facts else None
    if fault := tally.complaint(config.max_seq_length, overlong=config.overlong, room_tokens=room):
        raise DataError(f"{path}: {fault}")
    padding = _padding(tokens, index, config)
    report = tally.report(examples.maker.format, padding=padding, lines_in_file=len(index))
    largest = tally.largest()
    if next(tries, None) is not None:
        report = replace(report, longest_tokens=config.max_seq_length, all_checked=False)
        largest = tuple(_stretched(example, config.max_seq_length) for example in largest)
    sample = sample_of(examples[0], tokenizer)
    asking = examples.maker.asking
    return ExampleSet(examples, report, index.sha256, sample, asking, largest=largest, line_bytes=index.sizes)


def _used_lines(index: RowIndex, config: RunConfig) -> Iterator[int]:
    """The lines that the run uses, each once: the file's first, which tells the format, those watched, each step's."""
    seen: set[int] = set()
    steps = (chosen_examples(index.sizes, step=step, config=config) for step in range(config.max_steps))
    for lines in chain([[0], watched_lines(len(index), config)], steps) if len(index) else ():
        for line in lines:
            if line not in seen:
                seen.add(line)
                yield line
        if len(seen) == len(index):
            return


def _padding(tokens: dict[int, int], index: RowIndex, config: RunConfig) -> float:
    """The share of padding in the steps of which every row was looked at and kept."""
    steps = (chosen_examples(index.sizes, step=step, config=config) for step in range(config.max_steps))
    known = (step for step in islice(steps, CHECKED_ROWS) if all(tokens.get(line) for line in step))
    return padding_share(tokens, known)


def _stretched(example: Example, n_tokens: int) -> Example:
    """An example whose rows have `n_tokens` each, for a rehearsal of rows that nobody has seen."""
    rows = (TokenRow(np.resize(row.input_ids, n_tokens), np.resize(row.is_label, n_tokens)) for row in example.rows)
    return replace(example, rows=tuple(rows))
