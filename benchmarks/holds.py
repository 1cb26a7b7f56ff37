"""Does a run keep to its limit, whatever the limit?

The runs of plan_error.py, each against a random limit between a tenth and one and a half times what its plan says
it needs, with a random `--on-overflow`. Each is a whole run through the public API in a process of its own, whose
anonymous memory is sampled from outside once a millisecond. It may

    finish      within the limit
    refuse      BudgetError (exit 3) before a step was taken
    break       BudgetBrokenError (exit 4) after one: everything is saved, but the promise was not kept
    fail        anything else: a crash, an out-of-memory error that nobody caught

A breach is a sample above the limit, the libraries' share taken as what the process had at its start. The limit is
what the run is told and what is checked; a breach of up to SLACK_BYTES is the kernel's accounting (pages are counted
in batches of each thread) and is told apart.
"""

import gc
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from environment import environment, leave_result, parser_of
from plan_error import THERE_BEFORE, anonymous_of, checkpoint, config_of, drawn, warm_up

from agzo_edge.budget.detect import machine_profile
from agzo_edge.budget.facts import model_facts
from agzo_edge.budget.memory import predicted_memory
from agzo_edge.errors import BudgetBrokenError, BudgetError
from agzo_edge.events import Moved, Planned, Stepped
from agzo_edge.model.memory import give_back
from agzo_edge.session import training
from agzo_edge.units import MIB

SAMPLE_S = 0.001
SLACK_BYTES = 2 * MIB


def limited_run(model: Path, combination: dict[str, Any], folder: Path, *, limit_bytes: int) -> dict[str, Any]:
    """What became of a run under a limit, told by the run itself."""
    profile = write_profile(folder / "here.toml", context_bytes=anonymous_of(os.getpid()))
    settings = {
        "profile": str(profile),
        "ram_limit": f"{limit_bytes}B",
        "on_overflow": combination["on_overflow"],
    }
    told: dict[str, Any] = {"steps": 0, "moves": [], "rung": None}
    try:
        for event in training(config_of(model, combination, folder, settings)):
            if isinstance(event, Planned):
                told["rung"] = list(event.changes)
            elif isinstance(event, Moved):
                told["moves"].append(event.what)
            told["steps"] += isinstance(event, Stepped)
    except BudgetError as error:
        return told | {"outcome": "refuse", "message": str(error)[:300]}
    except BudgetBrokenError as error:
        return told | {"outcome": "break", "message": str(error)[:300]}
    return told | {"outcome": "finish"}


def watched(model: Path, combination: dict[str, Any], *, limit_bytes: int) -> dict[str, Any]:
    """A run in a child, watched from here: its outcome and the most anonymous memory it had."""
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reader)
                told = limited_run(model, combination, Path(folder), limit_bytes=limit_bytes)
                os.write(writer, json.dumps(told).encode()[-60_000:])
                code = 0
            except BaseException:  # noqa: BLE001  # whatever it is, it is told
                os.write(writer, json.dumps({"outcome": "fail", "message": traceback.format_exc()[-1500:]}).encode())
            finally:
                os._exit(code)
        os.close(writer)
        peak = 0
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            peak = max(peak, anonymous_of(child))
            time.sleep(SAMPLE_S)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read().decode()
    outcome = json.loads(told) if told else {"outcome": "fail", "message": "the process died without a word"}
    return outcome | {"peak_bytes": peak, "over_bytes": max(0, peak - limit_bytes)}


def needed_bytes(model: Path, combination: dict[str, Any], folder: Path) -> int:
    """The plan's peak without a limit, over what the process has before a run."""
    config = config_of(model, combination, folder, {})
    plan = predicted_memory(model_facts(str(model)), config, machine_profile("cpu"))
    return plan.device_bytes - plan.bytes_of(*THERE_BEFORE)


def write_profile(path: Path, *, context_bytes: int) -> Path:
    """A profile of this machine that says what this process, full of libraries, has before a run."""
    here = machine_profile("auto")
    path.write_text(
        f'name = "here"\nkind = "cpu"\nmemory = "{here.memory}B"\nreserve = "{here.reserve}B"\n'
        f'context_overhead = "{context_bytes}B"\n',
        encoding="utf-8",
    )
    return path


def main() -> None:
    """Draw, limit, run; exit status 1 when one passed its limit or failed."""
    parser = parser_of("holds", __doc__ or "")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--models", type=Path, help="where the models are kept; by default they are thrown away")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.count = 3
    began, until = environment(), time.monotonic() + arguments.seconds
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    dice, results = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as thrown_away:
        root = arguments.models or Path(thrown_away)
        warm_up(root)
        for number, combination in enumerate(drawn(arguments.seed, arguments.count)):
            if time.monotonic() > until:
                break
            model = checkpoint(root, combination["model"])
            gc.collect()
            give_back(torch.device("cpu"))
            combination["on_overflow"] = dice.choice(("fail", "shrink", "shrink", "stream", "stream"))
            with tempfile.TemporaryDirectory() as folder:
                planned = needed_bytes(model, combination, Path(folder))
            own = anonymous_of(os.getpid())
            limit_bytes = own + round(dice.uniform(0.1, 1.5) * max(MIB, planned))
            result = {"number": number, **combination, "limit_bytes": limit_bytes}
            results.append(result | watched(model, combination, limit_bytes=limit_bytes))
            last = results[-1]
            line = (
                f"{number:4d} {last['outcome']:7} {last['over_bytes'] / MIB:6.1f} MiB over of {limit_bytes / MIB:.0f}"
            )
            print(line, last.get("message", "")[-200:] if last["outcome"] in ("fail", "break") else "", file=sys.stderr)
    leave_result(arguments, began=began, summary=_summary(results), results=results)
    sys.exit(any(r["outcome"] in ("fail", "break") or r["over_bytes"] > SLACK_BYTES for r in results))


def _summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way to go on, and one for all."""
    rows = []
    for way in ("fail", "shrink", "stream", "all"):
        mine = [r for r in results if way in (r["on_overflow"], "all")]
        outcomes = Counter(r["outcome"] for r in mine)
        rows.append(
            {
                "on overflow": way,
                "runs": len(mine),
                **{name: outcomes[name] for name in ("finish", "refuse", "break", "fail")},
                "over the limit": sum(r["over_bytes"] > SLACK_BYTES for r in mine),
                "most over, MiB": max((r["over_bytes"] / MIB for r in mine), default=0.0),
                "moved while running": sum(bool(r.get("moves")) for r in mine),
            }
        )
    return rows


if __name__ == "__main__":
    main()
