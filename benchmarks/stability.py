"""Does a learning rate that is far too large ruin a run?

    OMP_NUM_THREADS=1 python benchmarks/stability.py [--quick] [--models ...] [--tasks ...] [--presets ...]

Whole runs through the public API on a 4-bit base: each preset at 1, 3, 10 and 30 times its own rate, with the undo and
without. Told: the held-out loss before, of `best/` (chosen by it, every EVAL_STEPS steps) and after, and how often the
run went back. The target: after is never above before. With `--factors 1 --steps 0 --no-without` it tells what each
preset gives as it ships (`presets.json`).
"""

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import transformers
from environment import SHARED, environment, leave_result, parser_of
from learning_tasks import TASKS, TRAINING_ROWS, spread

from agzo_edge.config import config_from
from agzo_edge.errors import NonFiniteLossError
from agzo_edge.events import Evaluated, WentBack
from agzo_edge.presets import PRESETS
from agzo_edge.session import training

MODELS = ("stories260K", "tiny-novels", "tinystories-chat-3m")
EVAL_STEPS = 50
FACTORS = (1.0, 3.0, 10.0, 30.0)


def one_run(
    model: Path, task: str, preset: str, *, factor: float, seed: int, undo: bool, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The held-out losses of one run at `factor` times the preset's rate, and how often it went back."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": str(model),
            "data": str(write_rows(Path(folder) / "train.jsonl", task, "train", TRAINING_ROWS)),
            "eval_data": str(write_rows(Path(folder) / "held-out.jsonl", task, "held-out", 2 * TASKS[task].held_out)),
            "output_dir": str(Path(folder) / "run"),
            "device": "cpu",
            "objective": TASKS[task].objective,
            "max_seq_length": TASKS[task].longest_tokens,
            "overlong": "drop",
            "seed": seed,
            "eval_steps": EVAL_STEPS,
            "learning_rate": factor * config_from(preset=preset).learning_rate,
        }
        settings |= {"max_steps": arguments.steps} if arguments.steps else {}
        settings |= {} if undo else {"undo_every": 0}
        losses, times_gone_back, ended = [], 0, "finished"
        try:
            for event in training(config_from(settings, preset=preset)):
                if isinstance(event, Evaluated):
                    losses.append(round(event.metrics.loss, 4))
                times_gone_back += isinstance(event, WentBack)
        except NonFiniteLossError:
            ended = "loss not finite"
    after = losses[-1] if ended == "finished" else None
    told = {"before": losses[0], "best": min(losses), "after": after}
    return told | {"times_gone_back": times_gone_back, "ended": ended}


def write_rows(path: Path, task: str, part: str, n_rows: int) -> Path:
    """Rows of a task as a file."""
    rows = spread(list(TASKS[task].rows(part)), n_rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    """Every preset on every task at every rate."""
    parser = parser_of("stability", __doc__ or "")
    parser.add_argument("--models", nargs="+", type=Path, default=[SHARED / "models" / name for name in MODELS])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["shakespeare", "instruct", "sst2", "trec"])
    parser.add_argument(
        "--presets", nargs="+", choices=list(PRESETS), default=[name for name in PRESETS if name != "paper"]
    )
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS))
    parser.add_argument("--steps", type=int, default=150, help="0 for each preset's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--without", action=argparse.BooleanOptionalAction, default=True, help="also without the undo")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.tasks, arguments.presets = arguments.models[:1], ["sst2"], ["default"]
        arguments.factors, arguments.steps = [30.0], 3
    transformers.utils.logging.disable_progress_bar()
    began, summary = environment(), []
    ways = (True, False) if arguments.without else (True,)
    for model, task, preset, factor, seed, undo in product(
        arguments.models, arguments.tasks, arguments.presets, arguments.factors, arguments.seeds, ways
    ):
        told = one_run(model, task, preset, factor=factor, seed=seed, undo=undo, arguments=arguments)
        row = {"model": model.name, "task": task, "preset": preset, "times its rate": factor, "seed": seed}
        row |= {"undo": undo} | told
        summary.append(row)
        print(*row.values(), flush=True)
    leave_result(arguments, began=began, summary=summary)


if __name__ == "__main__":
    main()
