"""How much of a step is padding, without and with examples of like length together, and what could packing save?

    python benchmarks/padding.py [--quick] [--model DIR] [--output FILE]

Lengths are those of real rows under a real tokenizer; no model runs. For each data set and batch size:

    alone      the share of padding where a step's examples are drawn from all lengths
    group N    the same with the examples of N steps sorted and cut into batches, as order.py does for N = 64
    packed     what packing would leave of a step, group 64: its rows, longest first, each in the first row of the
               pass with room for it, a row of the pass as long as the longest example
    saved      how many fewer tokens go through the model for `packed` than for `group 64`
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import SHARED, environment, leave_result, parser_of
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from agzo_edge.train import order

DATA = SHARED / "data"
GROUPS = (4, 16, 64, 256)
BATCH_SIZES = (4, 16)
Lengths = NDArray[np.int64]  # (rows,) tokens


def texts(name: str) -> Iterator[str]:
    """The rows of a data set in `../shared` as texts."""
    if name == "instructions":
        for row in json.loads((DATA / "instruct_rasbt/instruction-data.json").read_text(encoding="utf-8")):
            yield "\n".join((row["instruction"], row["input"], row["output"]))
    elif name == "entailment":
        for line in (DATA / "rte/train.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield f"{row['premise']}\n{row['hypothesis']}"
    elif name == "reviews":
        for line in (DATA / "sst2/train.tsv").read_text(encoding="utf-8").splitlines()[1:]:
            yield line.split("\t")[0]
    else:
        path = {"chats": "soda_chat/chat_val.txt", "stories": "tinystories/train_head_2MiB.txt"}[name]
        yield from filter(None, map(str.strip, (DATA / path).read_text(encoding="utf-8").split("<|endoftext|>")))


def row_lengths(name: str, tokenizer: PreTrainedTokenizerBase) -> Lengths:
    """The tokens of each row."""
    return np.array([len(ids) for ids in tokenizer(list(texts(name)))["input_ids"]])


def step_lengths(lengths: Lengths, *, batch_size: int, group_steps: int) -> list[Lengths]:
    """The lengths of the rows of each step of one epoch."""
    order.GROUP_STEPS = group_steps
    n_steps = len(lengths) // batch_size
    steps = (order.grouped_examples_of_step(lengths, step=s, batch_size=batch_size, seed=0) for s in range(n_steps))
    return [lengths[step] for step in steps]


def tokens_through(steps: Sequence[Lengths]) -> int:
    """The tokens of padded batches, padding included."""
    return sum(int(step.max()) * len(step) for step in steps)


def packed_tokens(steps: Sequence[Lengths]) -> int:
    """The same where examples share rows of the pass."""
    return sum(int(step.max()) * len(rows_packed(step)) for step in steps)


def rows_packed(lengths: Lengths) -> list[int]:
    """The tokens in each row of the pass, by first fit, longest first."""
    room = int(lengths.max())
    rows: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        place = next((i for i, held in enumerate(rows) if held + length <= room), None)
        if place is None:
            rows.append(length)
        else:
            rows[place] += length
    return rows


def summary_row(name: str, lengths: Lengths, batch_size: int) -> dict[str, Any]:
    """The shares of one data set at one batch size."""
    by_group = {n: step_lengths(lengths, batch_size=batch_size, group_steps=n) for n in (1, *GROUPS)}
    through = {n: tokens_through(steps) for n, steps in by_group.items()}
    used = {n: sum(int(step.sum()) for step in steps) for n, steps in by_group.items()}
    packed = packed_tokens(by_group[64])
    return {
        "data": name,
        "rows": len(lengths),
        "mean tokens": float(lengths.mean()),
        "longest": int(lengths.max()),
        "batch": batch_size,
        "alone": 1 - used[1] / through[1],
        **{f"group {n}": 1 - used[n] / through[n] for n in GROUPS},
        "packed": 1 - used[64] / packed,
        "saved": 1 - packed / through[64],
    }


def main() -> None:
    """Parse the command line and count."""
    parser = parser_of("padding", __doc__ or "")
    parser.add_argument("--model", type=Path, default=SHARED / "models/tiny-novels", help="whose tokenizer is taken")
    arguments = parser.parse_args()
    began = environment()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    names = ("instructions",) if arguments.quick else ("instructions", "entailment", "reviews", "chats", "stories")
    found = {name: row_lengths(name, tokenizer) for name in names}
    rows = [summary_row(name, lengths, size) for name, lengths in found.items() for size in BATCH_SIZES]
    leave_result(arguments, began=began, summary=rows)


if __name__ == "__main__":
    main()
