"""The examples of a source, with an account of what became of its rows."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from agzo_edge.budget.facts import ModelFacts
from agzo_edge.config import RunConfig
from agzo_edge.errors import DataError
from agzo_edge.train.data import Example, ExampleSet
from agzo_edge.train.length import longest_tokens
from agzo_edge.train.maker import ExampleMaker, sample_of
from agzo_edge.train.order import chosen_examples, padding_share
from agzo_edge.train.plain import text_rows
from agzo_edge.train.source import Split, large_file, read_rows
from agzo_edge.train.stream import STREAM_BYTES, streamed_examples
from agzo_edge.train.tally import Tally
from agzo_edge.train.undo import held_back


def load_examples(
    source: str,  # a file, a directory, or a data set of the hub
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    split: Split = "train",  # of a directory or a hub data set; a file is read whole
    facts: ModelFacts | None = None,  # of the model, for what it has no words or positions for
) -> ExampleSet:
    """The examples of a source; of a large JSON Lines file to train on, read when they are needed.

    Rows are no longer than the model of `facts` has positions for. Raises one DataError with the faults of all rows;
    of a large file, of the rows that the run uses.
    """
    if facts is not None and (room := facts.room_for(config)) is not None:
        config = config.model_copy(update={"max_seq_length": min(config.max_seq_length, room)})
    if split == "train" and (path := large_file(source, split=split, at_least=STREAM_BYTES)):
        return streamed_examples(path, tokenizer, config, facts=facts)
    maker, tally = ExampleMaker(source, tokenizer, config, facts=facts), Tally()
    examples: list[Example] = []
    limit = config.max_seq_length
    for row in text_rows(read_rows(source, split=split), tokenizer, max_tokens=limit, line_pattern=config.line_pattern):
        made = maker.made(row)
        tally.add(row.place, made)
        if made.example is not None:
            examples.append(made.example)
    room = facts.room_for(config) if facts else None
    if fault := tally.complaint(config.max_seq_length, overlong=config.overlong, room_tokens=room):
        raise DataError(f"{source}: {fault}")
    away = set(held_back(examples, config) if split == "train" else ())
    kept = [example for place, example in enumerate(examples) if place not in away]
    watched = [examples[place] for place in sorted(away)]
    report = tally.report(maker.format, padding=_padding(kept, config, split=split))
    n_labels = report.label_tokens - sum(example.label_tokens for example in watched)
    report = replace(report, rows_held_back=len(watched), label_tokens=n_labels)
    sample = sample_of(examples[0], tokenizer)
    return ExampleSet(kept, report, _sha256(examples), sample, maker.asking, held_back=watched)


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
