"""What keeping the record costs: a step's line, synced, and its window's bases, as a share of the step.

    OMP_NUM_THREADS=1 python benchmarks/journal_cost.py [--quick] [--directory DIR] [--output FILE]

One run is timed from inside: each step, and right after it the writing of its bases (in a step that opens a
window) and its line, both on the disk before the next step begins. The share is that of the same run. On a
busy machine a step waits for the processor more than a sync does, so the share of the step's processor time
is told too. The file system is that of --directory; a sync there costs what it costs.

The model is a random Llama and the rows are random tokens, 1,024 in a step; AGZO sends each row twice.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from environment import environment, leave_result, parser_of
from step_cost import saved_model

from agzo_edge.budget.detect import machine_profile
from agzo_edge.budget.facts import model_facts
from agzo_edge.budget.plan import fitted_run
from agzo_edge.config import RunConfig, config_from
from agzo_edge.model.load import load_model
from agzo_edge.record.journal import JournalWriter
from agzo_edge.rundir import JOURNAL_NAME, header_of, keep_step
from agzo_edge.train.data import DataReport, Example, ExampleSet
from agzo_edge.train.goal import goal_of
from agzo_edge.train.guard import Guard
from agzo_edge.train.learner import Learner
from agzo_edge.train.loop import run_steps
from agzo_edge.train.tokens import TokenRow

MU = 1e-2
WARM_UP_STEPS = 2  # the first steps of a process are slower: they are run, and not counted


def random_examples(n: int, *, tokens: int, vocab: int) -> ExampleSet:
    """`n` rows of random tokens, all of them labels but the first."""
    ids = np.random.default_rng(0).integers(0, vocab, size=(n, tokens))
    is_label = np.arange(tokens) > 0
    rows = [Example((TokenRow(row, is_label),), 0, f"row {i}") for i, row in enumerate(ids)]
    report = DataReport("text", n, n, 0, 0, n * (tokens - 1), tokens)
    return ExampleSet(rows, report, sha256="0" * 64)


def file_system_of(directory: Path) -> dict[str, str]:
    """The file system that holds `directory`, from /proc/mounts: type, device, options."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return {"type": "unknown"}
    best: tuple[int, dict[str, str]] = (-1, {"type": "unknown"})
    for line in mounts.read_text(encoding="utf-8").splitlines():
        device, mount, kind, options, *_ = line.split()
        if directory.is_relative_to(mount) and len(mount) >= best[0]:
            best = (len(mount), {"type": kind, "device": device, "mounted_on": mount, "options": options})
    return best[1]


def measured_steps(source: str, data: ExampleSet, config: RunConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Each counted step's seconds, and those of keeping it."""
    model = load_model(source, config)
    learner = Learner(model.branches, config)
    guard = Guard(model, fitted_run(model_facts(source), config, machine_profile("auto")).rungs)
    kept = []
    with JournalWriter.create(run_dir / JOURNAL_NAME, header_of(config, model, data, mu=MU)) as journal:
        before_s = time.process_time()
        for timed in run_steps(model, learner, data, guard=guard, mu=MU, goal=goal_of(config)):
            cpu_s, start_s = time.process_time() - before_s, time.perf_counter()
            keep_step(run_dir, journal, timed, learner)
            record_s = time.perf_counter() - start_s
            opens = learner.window_starts(timed.record.step)
            kept.append(
                {
                    "step_s": timed.wall_s,
                    "cpu_s": cpu_s,
                    "record_s": record_s,
                    "opens_window": opens,
                    "tokens": timed.tokens,
                }
            )
            before_s = time.process_time()
    return kept[WARM_UP_STEPS:]


def summary_row(name: str, steps: list[dict[str, Any]], *, file_system: str) -> dict[str, Any]:
    """Medians, and the record's share of all the time of these steps."""
    step_s, cpu_s, record_s = (sum(step[key] for step in steps) for key in ("step_s", "cpu_s", "record_s"))
    return {
        "steps": name,
        "count": len(steps),
        "file system": file_system,
        "tokens in a step": steps[0]["tokens"],
        "median step ms": 1e3 * statistics.median(step["step_s"] for step in steps),
        "median record ms": 1e3 * statistics.median(step["record_s"] for step in steps),
        "largest record ms": 1e3 * max(step["record_s"] for step in steps),
        "record / step %": round(100 * record_s / step_s, 3),
        "record / processor time %": round(100 * record_s / cpu_s, 3),
    }


def main() -> None:
    """Measure one run."""
    parser = parser_of("journal_cost", __doc__ or "")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the run is kept")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    vocab = 8192
    if arguments.quick:
        arguments.steps, arguments.examples, arguments.tokens = 4, 4, 16
        arguments.hidden, arguments.layers, vocab = 128, 1, 256
    transformers.utils.logging.disable_progress_bar()
    began = environment()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        folder = Path(name).resolve()
        (folder / "run").mkdir()
        source = saved_model(folder / "model", hidden=arguments.hidden, layers=arguments.layers, vocab=vocab)
        file_system = file_system_of(folder)
        data = random_examples(4 * arguments.examples, tokens=arguments.tokens, vocab=vocab)
        config = config_from(
            {"device": "cpu", "dtype": "float32", "batch_size": arguments.examples},
            {"max_steps": arguments.steps + WARM_UP_STEPS, "model": source, "data": "random"},
        )
        steps = measured_steps(source, data, config, folder / "run")
        run_bytes = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    opening = [step for step in steps if step["opens_window"]]
    groups = {"all": steps, "opening a window": opening, "others": [s for s in steps if not s["opens_window"]]}
    rows = [summary_row(n, group, file_system=file_system["type"]) for n, group in groups.items() if group]
    leave_result(
        arguments,
        began=began,
        summary=rows,
        file_system=file_system,
        run_bytes=run_bytes,
        config=config.model_dump(),
        steps=steps,
    )


if __name__ == "__main__":
    main()
