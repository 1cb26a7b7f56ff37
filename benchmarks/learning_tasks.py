"""The tasks of the learning benchmark: real data in `../shared`, as rows that agzo-edge itself would be given.

shakespeare   lines of plays, as text                              a shift of language
instruct      instructions and answers of a few words, alpaca      a shift of form
sst2          is a film review great or terrible?                  two options; phrases to learn, sentences held out
sst2-phrases  the same, with other phrases held out                two options
trec          what does a question ask for?                        six options
rte           does the second sentence follow from the first?      two options
copa          which is the cause, or the effect?                   two options, each a sentence
"""

import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from environment import SHARED
from transformers import PreTrainedTokenizerBase

from agzo_edge.config import config_from
from agzo_edge.data_config import Objective
from agzo_edge.train.data import ExampleSet
from agzo_edge.train.examples import load_examples

DATA = SHARED / "data"
Row = dict[str, Any]
TREC_KINDS = {
    "ABBR": " abbreviation",
    "DESC": " description",
    "ENTY": " thing",
    "HUM": " person",
    "LOC": " place",
    "NUM": " number",
}


def _shakespeare(part: str) -> Iterator[Row]:
    """Lines of speeches, two together; the last tenth of the text is held out."""
    lines = [line for line in (DATA / "tinyshakespeare/input.txt").read_text(encoding="utf-8").split("\n") if line]
    cut = len(lines) * 9 // 10
    chosen = lines[:cut] if part == "train" else lines[cut:]
    for start in range(0, len(chosen) - 1, 2):
        yield {"text": "\n".join(chosen[start : start + 2])}


def _instruct(part: str) -> Iterator[Row]:
    rows = json.loads((DATA / "instruct_rasbt/instruction-data.json").read_text(encoding="utf-8"))
    cut = len(rows) * 8 // 10
    yield from rows[:cut] if part == "train" else rows[cut:]


def _sst2(part: str, *, held_out: str = "test.tsv") -> Iterator[Row]:
    """Phrases to train on; whole sentences, or with "dev.tsv" other such phrases, held out."""
    path = DATA / "sst2" / {"train": "train.tsv", "held-out": held_out}[part]
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            prompt = f"{row['sentence'].strip()} It was"
            yield {"prompt": prompt, "options": [" terrible", " great"], "answer": int(row["label"])}


def _trec(part: str) -> Iterator[Row]:
    path = DATA / "trec" / {"train": "train.txt", "held-out": "test.txt"}[part]
    for line in path.read_text(encoding="latin-1").splitlines():
        label, question = line.split(" ", 1)
        kind = list(TREC_KINDS).index(label.partition(":")[0])
        yield {"prompt": f"{question} It asks for a", "options": list(TREC_KINDS.values()), "answer": kind}


def _json_lines(path: Path) -> Iterator[Row]:
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _rte(part: str) -> Iterator[Row]:
    for row in _json_lines(DATA / "rte" / {"train": "train.jsonl", "held-out": "val.jsonl"}[part]):
        prompt = f"{row['premise']} So {row['hypothesis'].rstrip('.')}? The answer is"
        yield {"prompt": prompt, "options": [" no", " yes"], "answer": int(row["label"] == "entailment")}


def _copa(part: str) -> Iterator[Row]:
    for row in _json_lines(DATA / "copa" / {"train": "train.jsonl", "held-out": "val.jsonl"}[part]):
        link = " because" if row["question"] == "cause" else ", so"
        options = [" " + row[name][0].lower() + row[name][1:] for name in ("choice1", "choice2")]
        yield {"prompt": row["premise"].rstrip(".") + link, "options": options, "answer": row["label"]}


@dataclass(frozen=True)
class Task:
    """One task and how much of it is used."""

    name: str
    objective: Objective
    rows: Callable[[str], Iterator[Row]]  # "train" or "held-out"
    longest_tokens: int  # longer rows are left out
    held_out: int  # examples, evenly spread


TASKS = {
    task.name: task
    for task in (
        Task("shakespeare", "lm", _shakespeare, 48, 96),
        Task("instruct", "lm", _instruct, 72, 96),
        Task("sst2", "choice", _sst2, 64, 192),
        Task("sst2-phrases", "choice", partial(_sst2, held_out="dev.tsv"), 64, 192),
        Task("trec", "choice", _trec, 64, 192),
        Task("rte", "choice", _rte, 192, 96),
        Task("copa", "choice", _copa, 64, 96),
    )
}
TRAINING_ROWS = 4096  # at most: no run here sees more


def task_examples(
    task: Task, tokenizer: PreTrainedTokenizerBase, *, held_out: int | None = None
) -> tuple[ExampleSet, ExampleSet]:
    """The training and the held-out examples, read as a run of agzo-edge reads them."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [list(task.rows(part)) for part in ("train", "held-out")]
        chosen = [spread(parts[0], TRAINING_ROWS), parts[1]]
        paths = [Path(folder) / f"{name}.jsonl" for name in ("train", "held-out")]
        for path, rows in zip(paths, chosen, strict=True):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {"objective": task.objective, "max_seq_length": task.longest_tokens, "overlong": "drop"}
        config = config_from({**settings, "undo_every": 0})  # whole: no row is held back to see harm by
        sets = [load_examples(str(path), tokenizer, config) for path in paths]
    last = sets[1]
    return sets[0], replace(last, examples=spread(last.examples, held_out or task.held_out))


def spread(rows: Sequence[Any], n: int) -> list[Any]:
    """At most `n` of the rows, evenly spread over all."""
    every = max(1, len(rows) // n)
    return list(rows[::every][:n])
