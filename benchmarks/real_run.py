"""A real run on real data through the public API: does the held-out loss fall?

    OMP_NUM_THREADS=1 python benchmarks/real_run.py [--quick] [--model DIR] [--text FILE] [--output FILE]

A small story model, quantized to 4 bit, learns Shakespeare with the default preset. Rows are whole lines of
the text, put together until they hold about `--tokens` tokens. The last tenth of the text is held out, so no
held-out line stands between training lines. One run for each seed; the loss is the mean per held-out token.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from environment import SHARED, environment, leave_result, parser_of
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import agzo_edge
from agzo_edge.events import Evaluated, Event, MuChosen, Stepped

HELD_OUT_SHARE = 0.1


def text_rows(text: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> Iterator[dict[str, str]]:
    """Consecutive lines together, each row the first to reach `tokens` tokens."""
    lines: list[str] = []
    n_tokens = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        n_tokens += len(tokenizer(line, add_special_tokens=False)["input_ids"])
        if n_tokens >= tokens:
            yield {"text": "".join(lines).strip()}
            lines, n_tokens = [], 0


def write_split(folder: Path, rows: Sequence[dict[str, str]], *, held_out: int) -> tuple[Path, Path]:
    """The files of training and held-out rows; the latter are spread over the last tenth of the text."""
    n_train = round(len(rows) * (1 - HELD_OUT_SHARE))
    last = rows[n_train:]
    chosen = last[:: max(1, len(last) // held_out)][:held_out]
    train, valid = folder / "train.jsonl", folder / "valid.jsonl"
    for path, part in ((train, rows[:n_train]), (valid, chosen)):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return train, valid


class Watch:
    """What the events of one run tell."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float]] = []
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        if isinstance(event, Evaluated):
            self.curve.append((event.step, event.metrics.loss))
        elif isinstance(event, Stepped):
            self.losses.append(event.timed.record.loss)
        elif isinstance(event, MuChosen):
            self.facts |= {"mu": event.probe.mu, "noise_floor": event.probe.noise_floor}


def one_run(data: tuple[Path, Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train once; the curve of the held-out loss, each step's training loss, and the run's own report."""
    watch = Watch()
    run = agzo_edge.finetune(data=str(data[0]), eval_data=str(data[1]), output_dir=str(out), observe=watch, **settings)
    return {"seed": settings["seed"], **watch.facts, "curve": watch.curve, "losses": watch.losses, "report": run.report}


def summary_row(run: dict[str, Any]) -> dict[str, Any]:
    """Before and after of one run."""
    (_, before), (steps, after) = run["curve"][0], run["curve"][-1]
    return {
        "seed": run["seed"],
        "steps": steps,
        "held-out loss before": before,
        "after": after,
        "lowest": min(loss for _, loss in run["curve"]),
        "training s": run["report"]["wall_s"],
        "curve": " ".join(f"{loss:.2f}" for _, loss in run["curve"]),
    }


def main() -> None:
    """Train once for each seed."""
    parser = parser_of("real_run", __doc__ or "")
    parser.add_argument("--model", type=Path, default=SHARED / "models/tinystories-chat-3m")
    parser.add_argument("--text", type=Path, default=SHARED / "data/tinyshakespeare/input.txt")
    parser.add_argument("--tokens", type=int, default=64, help="in a row, about")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--held-out-rows", type=int, default=96)
    parser.add_argument("--eval-steps", type=int, default=25)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.held_out_rows, arguments.seeds, arguments.tokens = 2, 4, [0], 12
    transformers.utils.logging.disable_progress_bar()
    began = environment()
    settings = {
        "model": str(arguments.model),
        "device": "cpu",
        "load_in_4bit": True,
        "overlong": "truncate",
        "max_seq_length": 4 * arguments.tokens,
        "max_steps": arguments.steps,
        "eval_steps": arguments.eval_steps,
    }
    with tempfile.TemporaryDirectory() as folder:
        text = arguments.text.read_text(encoding="utf-8")
        rows = list(text_rows(text, AutoTokenizer.from_pretrained(arguments.model), tokens=arguments.tokens))
        data = write_split(Path(folder), rows, held_out=arguments.held_out_rows)
        runs = [one_run(data, Path(folder) / f"seed-{seed}", settings | {"seed": seed}) for seed in arguments.seeds]
    after = [run["curve"][-1][1] for run in runs]
    spread = {"mean_after": statistics.mean(after), "least_after": min(after), "most_after": max(after)}
    summary = [summary_row(run) for run in runs]
    leave_result(arguments, began=began, summary=summary, run_settings=settings, spread=spread, runs=runs)


if __name__ == "__main__":
    main()
