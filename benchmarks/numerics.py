"""How far are finite differences from the exact derivative, and does mu auto find the size that is nearest?

    OMP_NUM_THREADS=1 python benchmarks/numerics.py [--quick] [--models ...] [--tasks ...] [--output FILE]

What `agzo-edge doctor --numerics` measures, for every model, task, width of the weights and compute dtype: the
relative error of 64 projected gradients (4 draws, 16 examples) against exact ones in the same dtype, over mu. In
bfloat16 and float16 exact derivatives are themselves rounded, so errors of a few hundredths cannot be told apart.
A CPU computes here; a GPU's kernels round in another order.
"""

from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import transformers
from environment import SHARED, environment, leave_result, parser_of
from learning_methods import BASES
from learning_tasks import TASKS, task_examples

from agzo_edge.config import config_from
from agzo_edge.model.load import load_model
from agzo_edge.train.fidelity import Fidelity, fidelity
from agzo_edge.train.goal import goal_of

MODELS = ("stories260K", "tiny-novels", "tinystories-chat-3m")
DTYPES = ("float32", "bfloat16", "float16")


def seen_by(source: Path, task: str, base: str, *, dtype: str) -> Fidelity:
    """What the doctor sees of one model."""
    settings = {"device": "cpu", "dtype": dtype, "objective": TASKS[task].objective}
    config = config_from(settings, BASES[base])
    model = load_model(str(source), config)
    data, _ = task_examples(TASKS[task], model.tokenizer, held_out=1)
    return fidelity(model, data, config, goal=goal_of(config))


def summary_row(where: dict[str, str], seen: Fidelity) -> dict[str, Any]:
    """The size that mu auto takes beside the best one."""
    return where | {
        "mu auto": seen.probe.mu,
        "its error": seen.error_of_auto,
        "noise floor": seen.probe.noise_floor,
        "best mu": seen.best,
        "best error": seen.errors[seen.sizes.index(seen.best)],
    }


def main() -> None:
    """Look at every combination."""
    parser = parser_of("numerics", __doc__ or "")
    parser.add_argument("--models", nargs="+", type=Path, default=[SHARED / "models" / name for name in MODELS])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["shakespeare", "sst2"])
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=["float32", "4bit"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.tasks, arguments.bases = arguments.models[:1], ["shakespeare"], ["4bit"]
        arguments.dtypes = ["float32", "bfloat16"]
    transformers.utils.logging.disable_progress_bar()
    began = environment()
    summary, results = [], []
    for source, task, base, dtype in product(arguments.models, arguments.tasks, arguments.bases, arguments.dtypes):
        seen = seen_by(source, task, base, dtype=dtype)
        where = {"model": source.name, "task": task, "base": base, "dtype": dtype}
        summary.append(summary_row(where, seen))
        results.append(where | asdict(seen))
        print(*summary[-1].values(), flush=True)
    leave_result(arguments, began=began, summary=summary, results=results)


if __name__ == "__main__":
    main()
