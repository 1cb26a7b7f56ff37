"""Which method learns most from the same forward passes?

    OMP_NUM_THREADS=1 python benchmarks/learning.py [--quick] [--models ...] [--bases ...] [--tasks ...] [--methods ...]

`learning_tasks.py` says what the tasks are, `learning_methods.py` what the methods are. Every cell (model, base,
task, method) is swept: four learning rates a decade apart with one seed, the half decades on both sides of the best,
then two more seeds at the two best. The best rate is the one with the lowest mean held-out loss at the end, so each
method's number is chosen on the held-out rows, in the same way. `preset` is the default preset as it ships, at its
own rate, with as many seeds and no choice at all.

Each run is in the JSON as soon as it is over, with its curve of the held-out loss; a run that is there already is
not made again, so the benchmark goes on where it was stopped. `learning_report.py` makes the tables and the plots.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from environment import SHARED, environment, leave_result, parser_of
from learning_methods import BASES, METHODS, Setup, loaded, training
from learning_report import summary_of, targets_of, write_plots
from learning_tasks import TASKS, spread, task_examples

from agzo_edge.errors import NonFiniteLossError
from agzo_edge.model.memory import PeakMeter
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.train.data import Example
from agzo_edge.train.evaluate import evaluate
from agzo_edge.train.objective import GOALS

LOST_LOSS = 50.0  # nats: four times what a uniform guess over a vocabulary of 150,000 costs; the weights blew up
HALF_DECADE = math.sqrt(10.0)
MODELS = ("stories260K", "tiny-novels", "tinystories-chat-3m")
Run = dict[str, Any]


@dataclass
class Bench:
    """All runs so far and the file they are kept in."""

    arguments: argparse.Namespace
    began: dict[str, Any]
    runs: list[Run]

    def run(self, setup: Setup, task: str) -> Run:
        """The run of this setup: made now, unless it is kept from before."""
        wanted = json.loads(json.dumps({"task": task, **asdict(setup), "source": setup.source.name}))
        for run in self.runs:
            if run["setup"] == wanted:
                return run
        run = {"setup": wanted, **one_run(setup, task, self.arguments)}
        self.runs.append(run)
        self.keep()
        rate, curve = run["rate"], run["curve"]
        print(
            f"{setup.source.name} {setup.base} {task} {setup.method} {rate:.3g} {setup.seed}:", *curve[-1], flush=True
        )
        return run

    def keep(self) -> None:
        """Write everything aside, then in place: a kill loses at most the run under way."""
        path = self.arguments.output
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        settings = vars(self.arguments)
        partial.write_text(json.dumps({**self.began, "settings": settings, "runs": self.runs}, default=str) + "\n")
        partial.replace(path)


def one_run(setup: Setup, task: str, arguments: argparse.Namespace) -> Run:
    """The curve of (steps, held-out loss, accuracy) of one training, what it took, and what rows to learn from cost."""
    model = loaded(setup)
    data, held_out = task_examples(TASKS[task], model.tokenizer, held_out=arguments.held_out)
    steps = setup.steps_within_forwards
    every = max(1, steps // arguments.evaluations)
    learned = spread(data.examples, len(held_out.examples))
    curve = [(0, *_scored(model, held_out.examples, task))]
    on_learned = [_scored(model, learned, task)]
    train_s, began = 0.0, time.perf_counter()
    try:
        for step, _ in enumerate(training(setup, model, data), start=1):
            if step % every == 0 or step == steps:
                train_s += time.perf_counter() - began
                curve.append((step, *_scored(model, held_out.examples, task)))
                began = time.perf_counter()
                if not curve[-1][1] < LOST_LOSS:
                    break
    except NonFiniteLossError:
        curve.append((curve[-1][0] + 1, LOST_LOSS, None))
    on_learned.append(_scored(model, learned, task))
    rate = setup.config().learning_rate
    return {"rate": rate, "curve": curve, "on_learned": on_learned, "train_s": round(train_s, 2)}


def _scored(model: EdgeModel, examples: Sequence[Example], task: str) -> tuple[float, float | None]:
    """(loss, accuracy); a loss that is not finite counts as LOST_LOSS."""
    metrics = evaluate(
        model, examples, objective=TASKS[task].objective, goal=GOALS[TASKS[task].objective], batch_size=32
    )
    loss = metrics.loss if math.isfinite(metrics.loss) else LOST_LOSS
    return round(min(loss, LOST_LOSS), 5), metrics.accuracy


def sweep(bench: Bench, setup: Setup, task: str) -> None:
    """Find the best rate of a cell with one seed, then give the two best more seeds."""
    found: dict[float, float] = {}

    def try_rates(rates: Iterator[float] | tuple[float, ...]) -> None:
        for rate in rates:
            run = bench.run(replace(setup, rate=rate), task)
            found[rate] = run["curve"][-1][1]

    rates = bench.arguments.rates or METHODS[setup.method].rates
    if bench.arguments.quick:
        rates = rates[1:2]
    try_rates(tuple(rates))
    if bench.arguments.refine:
        best = min(found, key=found.__getitem__)
        try_rates((round_rate(best / HALF_DECADE), round_rate(best * HALF_DECADE)))
    for rate in sorted(found, key=found.__getitem__)[: bench.arguments.best_rates]:
        for seed in bench.arguments.seeds[1:]:
            bench.run(replace(setup, rate=rate, seed=seed), task)


def round_rate(rate: float) -> float:
    """The rate with two digits, 0.32 and not 0.316227766."""
    return float(f"{rate:.1e}")


def cells(arguments: argparse.Namespace) -> Iterator[tuple[Setup, str, bool]]:
    """Every cell's first setup, its task, and whether its rate is to be found."""
    for source, base, task, method in product(arguments.models, arguments.bases, arguments.tasks, arguments.methods):
        is_swept = method != "preset"
        setup = Setup(
            source=source,
            base=base,
            method=method if is_swept else "default",
            rate=None,
            seed=arguments.seeds[0],
            steps=arguments.steps,
            objective=TASKS[task].objective,
            batch_size=arguments.batch_size,
        )
        yield setup, task, is_swept


def peak_bytes(setup: Setup, task: str) -> int:
    """What three steps add to the memory of a fresh process that has loaded the model."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes_here, (setup, task))


def _peak_bytes_here(setup: Setup, task: str) -> int:
    torch.set_num_threads(1)
    model = loaded(setup)
    data, _ = task_examples(TASKS[task], model.tokenizer, held_out=1)
    meter = PeakMeter(model.device)
    before = meter.read()
    for _ in training(replace(setup, steps=3), model, data):
        meter.read()
    return meter.peak_bytes - before


def quick(arguments: argparse.Namespace) -> None:
    """Settings that take seconds: every method for two steps at one rate."""
    arguments.models, arguments.tasks, arguments.bases = arguments.models[:1], ["sst2"], ["4bit"]
    arguments.steps, arguments.evaluations, arguments.held_out, arguments.seeds = 2, 2, 4, arguments.seeds[:1]
    arguments.refine = arguments.peaks = False


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = parser_of("learning", __doc__ or "")
    parser.add_argument("--models", nargs="+", type=Path, default=[SHARED / "models" / name for name in MODELS])
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=["float32"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    methods = ["preset", *METHODS]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--rates", nargs="+", type=float, default=None, help="instead of each method's own")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--best-rates", type=int, default=2, help="how many of a sweep's rates get all seeds")
    parser.add_argument("--evaluations", type=int, default=10, help="in a run, evenly spread")
    parser.add_argument("--held-out", type=int, default=None, help="held-out examples; the task's own by default")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--refine", action=switch, default=True, help="half decades around a sweep's best rate")
    parser.add_argument("--peaks", action=switch, default=True, help="memory of each method, in fresh processes")
    arguments = parser.parse_args()
    if arguments.quick:
        quick(arguments)
    return arguments


def main() -> None:
    """Fill every cell, then tell."""
    arguments = parsed()
    transformers.utils.logging.disable_progress_bar()
    kept = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    bench = Bench(arguments, environment(), kept.get("runs", []))
    peaks: dict[str, int] = kept.get("peak_bytes", {})
    for setup, task, is_swept in cells(arguments):
        if is_swept:
            sweep(bench, setup, task)
        else:
            for seed in arguments.seeds:
                bench.run(replace(setup, seed=seed), task)
        where = f"{setup.source.name} {setup.base} {task} {setup.method}"
        if arguments.peaks and where not in peaks:
            peaks[where] = peak_bytes(setup, task)
    summary = summary_of(bench.runs, peaks)
    write_plots(bench.runs, arguments.output.with_suffix(""))
    targets = targets_of(bench.runs)
    leave_result(arguments, began=bench.began, summary=summary, targets=targets, peak_bytes=peaks, runs=bench.runs)


if __name__ == "__main__":
    main()
