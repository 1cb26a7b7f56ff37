"""Does a model whose weights are four times the limit train inside the limit, to the same losses?

A random Llama in float32 is trained twice through the public API, a few steps on random rows: once without a limit,
once under `--ram-limit` of a quarter of its weights with `--on-overflow stream`. Told are the limit, the plan, the
most anonymous memory of the whole process (sampled from outside once a millisecond), the time of a step in both
runs, and whether every step's loss and the adapter are the same bytes.

On a CPU streaming means a mapped file: a step's time over the unlimited one is that of reading it, here out of the page
cache of a machine with memory to spare. Streaming to a GPU is in gpu.py.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from environment import environment, leave_result, parser_of
from plan_error import anonymous_of, checkpoint, config_of

from agzo_edge.errors import AgzoError
from agzo_edge.events import Moved, Planned, Stepped
from agzo_edge.session import training
from agzo_edge.units import MIB


def told_run(model: Path, combination: dict[str, Any], folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """What a run says of itself."""
    told: dict[str, Any] = {"losses": [], "step_s": [], "moves": []}
    try:
        for event in training(config_of(model, combination, folder, more)):
            if isinstance(event, Planned):
                told |= {"planned_bytes": event.plan.device_bytes, "limit_bytes": event.plan.limit_bytes}
                told["changes"] = list(event.changes)
            elif isinstance(event, Moved):
                told["moves"].append(event.what)
            elif isinstance(event, Stepped):
                told["losses"].append(event.timed.record.loss)
                told["step_s"].append(event.timed.wall_s)
    except AgzoError as error:
        return told | {"error": str(error)}
    return told | {"adapter": (folder / "out" / "adapter_model.safetensors").read_bytes().hex()}


def watched(model: Path, combination: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A run in a child, and the most anonymous memory that the child had."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                (folder / "told.json").write_text(json.dumps(told_run(model, combination, folder, more)))
                code = 0
            finally:
                os._exit(code)
        peak = 0
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            peak = max(peak, anonymous_of(child))
            time.sleep(0.001)
        return json.loads((folder / "told.json").read_text()) | {"peak_bytes": peak}


def main() -> None:
    """Both runs; exit status 1 when the limit did not hold or the losses differ."""
    parser = parser_of("streaming", __doc__ or "")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.25, help="of the weights' bytes: the limit")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.hidden, arguments.layers, arguments.steps, arguments.share = 256, 2, 2, 200.0
    began = environment()
    transformers.utils.logging.disable_progress_bar()
    sizes = {"family": "llama", "hidden": arguments.hidden, "vocab": 2000, "layers": arguments.layers}
    settings = {
        "objective": "lm",
        "batch_size": 1,
        "max_seq_length": 64,
        "max_steps": arguments.steps,
        "refresh_every": 2,
        "adapter_rank": 4,
        "rank": 1,
        "load_in_4bit": False,
        "on_overflow": "stream",
    }
    combination = {"settings": settings, "evaluates": False}
    with tempfile.TemporaryDirectory(dir=Path.home()) as root:  # not in a /tmp that is memory
        model = checkpoint(Path(root), sizes | {"stored": "float32", "grouped": 1})
        weight_bytes = (model / "model.safetensors").stat().st_size
        limit_bytes = round(arguments.share * weight_bytes)
        runs = {
            "no limit": watched(model, combination, {}),
            "streamed": watched(model, combination, {"ram_limit": f"{limit_bytes}B"}),
        }
    usual, streamed = runs.values()
    same = usual.pop("adapter", None) == streamed.pop("adapter", "") and usual["losses"] == streamed["losses"]
    holds = "error" not in streamed and streamed["peak_bytes"] <= limit_bytes
    summary = [
        {
            "run": name,
            "weights MiB": weight_bytes / MIB,
            "limit MiB": run["limit_bytes"] / MIB,
            "planned MiB": run["planned_bytes"] / MIB,
            "peak MiB": run["peak_bytes"] / MIB,
            "median step s": statistics.median(run["step_s"]) if run["step_s"] else None,
            "same losses and adapter": same,
        }
        for name, run in runs.items()
        if "planned_bytes" in run
    ]
    leave_result(arguments, began=began, summary=summary, runs=runs, weight_bytes=weight_bytes, same=same, holds=holds)
    sys.exit(not (same and holds))


if __name__ == "__main__":
    main()
