"""Runs killed at random moments end where the uninterrupted run ends, to the byte.

    OMP_NUM_THREADS=1 python benchmarks/kill.py [--quick] [--kills 200] [--output FILE]

A trial is a run in a process of its own that dies once to four times, and is resumed after each death:

    time    SIGKILL from outside at a uniformly random part of the run's usual duration
    torn    SIGKILL from inside at a random one of its writes, syncs, renames ..., a write done in part
    power   the same, and what was not synced is lost or torn (tests/faulty_disk.py)

A step is lost when the run had told it, or its line stood whole in the journal, and it is done again. At the
end the adapter, its configuration and the evaluations are compared with those of the uninterrupted run, and
a replay of the journal with the adapter. After every death, every checkpoint that says it is one is loaded.
"""

import contextlib
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from environment import ROOT, environment, leave_result, parser_of

sys.path.append(str(ROOT / "tests"))

import peft  # noqa: F401 - the children find it imported
import torch
import transformers
from faulty_disk import FaultyDisk
from helpers import SHAPE, save_tiny

import agzo_edge
from agzo_edge.config import RunConfig, config_from
from agzo_edge.events import ModelReady, Stepped
from agzo_edge.record.adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from agzo_edge.rundir import EVALUATIONS_NAME, JOURNAL_NAME
from agzo_edge.session import training

STEPS = 11  # three windows of three, and a fourth one left open
SETTINGS: Mapping[str, Any] = {
    "device": "cpu",
    "load_in_4bit": True,
    "dtype": "float32",
    "max_steps": STEPS,
    "refresh_every": 3,
    "rank": 2,
    "adapter_rank": 4,
    "batch_size": 4,
    "save_steps": 2,
    "eval_steps": 4,
    "max_seq_length": 64,
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"mu": "auto"},
    "adam": {
        **{"mu": 0.01, "optimizer": "adam", "lr_schedule": "cosine", "warmup_steps": 2, "micro_batch_size": 2},
        "guide": "head",
    },
    "momentum on an adapter": {"mu": 0.01, "optimizer": "momentum", "refresh_every": 4},
}
Kind = Literal["time", "torn", "power"]
KINDS: tuple[Kind, ...] = ("time", "torn", "power")
CHECKED = re.compile(rb'(\{.*),"crc":"([0-9a-f]{8})"\}')


@dataclass(frozen=True)
class Death:
    """How and when a process is to die."""

    kind: Kind
    after_s: float | None = None  # time
    at_call: int | None = None  # torn, power


@dataclass
class Sitting:
    """What a process told before it ended."""

    first_step: int | None = None
    steps: list[int] = field(default_factory=list)
    calls: int = 0  # that change files, of a whole sitting
    duration_s: float = 0.0
    killed: bool = False
    replay_equal: bool | None = None


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run."""

    config: RunConfig
    files: Mapping[str, bytes]  # those that must come out the same
    calls: int
    duration_s: float


def sit(config: RunConfig, *, resume: bool, death: Death | None, generator: random.Random) -> Sitting:
    """One process that trains until it ends or dies. Raises RuntimeError when it fails in another way."""
    read_end, write_end = os.pipe()
    start_s = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _train_and_exit(config, resume=resume, death=death, generator=generator, told=write_end)
    os.close(write_end)
    told = _told(read_end, child, kill_at_s=start_s + death.after_s if death and death.after_s is not None else None)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    sitting = Sitting(duration_s=time.monotonic() - start_s, killed=killed)
    for line in told.decode().splitlines():
        name, value = json.loads(line)
        if name == "step":
            sitting.steps.append(value)
        elif name == "failed":
            raise RuntimeError(f"a process failed after {death}:\n{value}")
        else:
            setattr(sitting, name, value)
    if not killed and status != 0:
        raise RuntimeError(f"a process ended with status {status}")
    return sitting


def _told(pipe: int, child: int, *, kill_at_s: float | None) -> bytes:
    """All that `child` writes into `pipe`; it gets SIGKILL at the given moment."""
    told = b""
    with open(pipe, "rb", buffering=0) as stream:
        while True:
            wait_s = None if kill_at_s is None else max(0.0, kill_at_s - time.monotonic())
            if not select.select([stream], [], [], wait_s)[0]:
                os.kill(child, signal.SIGKILL)
                kill_at_s = None
            elif data := stream.read(65536):
                told += data
            else:
                return told


def _train_and_exit(
    config: RunConfig, *, resume: bool, death: Death | None, generator: random.Random, told: int
) -> None:
    """The child's life. Every event is told with one system call, so that death cannot hold it back."""

    def tell(name: str, value: object) -> None:
        os.write(told, json.dumps([name, value]).encode() + b"\n")

    status = 1
    try:
        out = Path(str(config.output_dir))
        fault: Literal["torn", "power"] = "power" if death and death.kind == "power" else "torn"
        with FaultyDisk(out.parent, fault, at_call=death.at_call if death else None, generator=generator) as disk:
            for event in training(config, resume=resume):
                if isinstance(event, ModelReady):
                    tell("first_step", event.first_step)
                elif isinstance(event, Stepped):
                    tell("step", event.timed.record.step)
        tell("calls", disk.calls)
        if death is None:
            replayed = out.with_name("replayed")
            agzo_edge.replay(out, output=replayed)
            tell("replay_equal", (replayed / WEIGHTS_NAME).read_bytes() == (out / WEIGHTS_NAME).read_bytes())
        status = 0
    except BaseException:  # noqa: BLE001 - told, and the process ends
        tell("failed", traceback.format_exc())
    finally:
        os._exit(status)


def whole_lines(journal: Path) -> int:
    """Steps whose lines are whole and checked, told without the package's reader."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    sound = 0
    for line in lines:
        match = CHECKED.fullmatch(line)
        if match is None or zlib.crc32(match[1] + b"}") != int(match[2], 16):
            break
        sound += 1
    return max(0, sound - 1)  # the header is none


def compared_files(run_dir: Path) -> dict[str, bytes]:
    """The files that must be those of the uninterrupted run."""
    return {name: (run_dir / name).read_bytes() for name in (WEIGHTS_NAME, CONFIG_NAME, EVALUATIONS_NAME)}


def broken_checkpoints(run_dir: Path) -> list[str]:
    """The adapters in `run_dir` that have a configuration and do not load."""
    broken = []
    for config in run_dir.glob(f"**/{CONFIG_NAME}"):
        try:
            load_adapter(config.parent)
        except agzo_edge.AgzoError as error:
            broken.append(str(error))
    return broken


def drawn_death(kind: Kind, reference: Reference, generator: random.Random) -> Death:
    """A moment somewhere in a run's usual course."""
    if kind == "time":
        return Death(kind, after_s=generator.uniform(0, reference.duration_s))
    return Death(kind, at_call=generator.randrange(reference.calls))


def trial(number: int, reference: Reference, folder: Path, *, seed: int) -> dict[str, Any]:
    """A run killed at least once, resumed to its end, and compared."""
    generator = random.Random(f"{seed} {number}")
    config = reference.config.model_copy(update={"output_dir": str(folder / "run")})
    journal = folder / "run" / JOURNAL_NAME
    deaths: list[dict[str, Any]] = []
    lost, broken, whole = 0, [], 0
    wanted = generator.choices((1, 2, 3, 4), (8, 4, 2, 1))[0]
    kinds = [KINDS[number % len(KINDS)], *generator.choices(KINDS, k=wanted - 1)]
    while True:
        death = drawn_death(kinds[len(deaths)], reference, generator) if len(deaths) < wanted else None
        sitting = sit(config, resume=bool(deaths), death=death, generator=generator)
        lost += len([step for step in sitting.steps if step < whole])  # done again
        if not sitting.killed and not deaths:  # it ended before its moment: begin again
            _empty(folder)
            continue
        told = max([whole, *(step + 1 for step in sitting.steps)])
        whole = whole_lines(journal)
        lost += max(0, told - whole)
        if not sitting.killed:
            break
        broken += broken_checkpoints(folder / "run")
        deaths.append({**vars(death), "steps_told": told, "steps_whole": whole})
    if sitting.replay_equal is None:  # a resumed sitting outlived its moment: the run is complete
        sitting = sit(config, resume=True, death=None, generator=generator)
        lost += len(sitting.steps)
    files = compared_files(folder / "run")
    return {
        "trial": number,
        "deaths": deaths,
        "steps_lost": lost,
        "equal": {name: files[name] == reference.files[name] for name in files},
        "replay_equal": sitting.replay_equal,
        "broken_checkpoints": broken,
        "leftovers": sorted(path.name for path in (folder / "run").rglob("*.partial")),
    }


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def references(folder: Path) -> dict[str, Reference]:
    """The uninterrupted run of each variant, on a random Llama and some lines of text."""
    model = save_tiny(transformers.LlamaConfig(**SHAPE), folder / "model")
    for name, count in (("train", 24), ("valid", 6)):
        rows = [{"prompt": f"{name} {i}: ", "completion": f"the answer to {i} is {i * i % 17}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fixed = {"model": str(model), "data": str(folder / "train.jsonl"), "eval_data": str(folder / "valid.jsonl")}
    found: dict[str, Reference] = {}
    for name, settings in VARIANTS.items():
        run_dir = folder / name.replace(" ", "-") / "run"
        run_dir.parent.mkdir()
        more = {"adapter": str(folder / "sgd" / "run")} if "adapter" in name else {}
        config = config_from(SETTINGS, settings, fixed, more, {"output_dir": str(run_dir)})
        for _ in range(2):  # the first one of a process's children is slower
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.rmtree(run_dir.with_name("replayed"), ignore_errors=True)
            sitting = sit(config, resume=False, death=None, generator=random.Random(0))
        assert sitting.replay_equal, "the uninterrupted run cannot be replayed"
        found[name] = Reference(config, compared_files(run_dir), sitting.calls, sitting.duration_s)
    return found


def summary_of(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind of the first death, and one for all."""
    groups = {kind: [t for t in trials if t["deaths"][0]["kind"] == kind] for kind in KINDS}
    return [_row(name, group) for name, group in [*groups.items(), ("all", trials)] if group]


def _row(name: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    count = len(trials)
    return {
        "first death": name,
        "runs": count,
        "deaths": sum(len(t["deaths"]) for t in trials),
        "completed steps lost": sum(t["steps_lost"] for t in trials),
        "adapter bitwise equal": f"{sum(t['equal'][WEIGHTS_NAME] for t in trials)} of {count}",
        "everything equal": f"{sum(all(t['equal'].values()) for t in trials)} of {count}",
        "replay equal": f"{sum(bool(t['replay_equal']) for t in trials)} of {count}",
        "broken checkpoints": sum(len(t["broken_checkpoints"]) for t in trials),
        "files left aside": sum(len(t["leftovers"]) for t in trials),
        "median steps done at death": statistics.median(d["steps_whole"] for t in trials for d in t["deaths"]),
    }


def main() -> None:
    """Run every trial; exit status 1 when one lost anything."""
    parser = parser_of("kill", __doc__ or "")
    parser.add_argument("--kills", type=int, default=200, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills = 6
    logging.disable(logging.WARNING)  # bitsandbytes tells every process which kernels it lacks
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    began, trials = environment(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        found = references(folder)
        for number in range(arguments.kills):
            variant = list(found)[number // len(KINDS) % len(found)]
            here = folder / f"trial-{number}"
            here.mkdir()
            trials.append({"variant": variant} | trial(number, found[variant], here, seed=arguments.seed))
            with contextlib.suppress(OSError):
                shutil.rmtree(here)
    usual = {name: {"calls": one.calls, "duration_s": one.duration_s} for name, one in found.items()}
    leave_result(arguments, began=began, summary=summary_of(trials), usual=usual, trials=trials)
    good = all(all(t["equal"].values()) and t["replay_equal"] and not t["steps_lost"] for t in trials)
    sys.exit(0 if good and not any(t["broken_checkpoints"] for t in trials) else 1)


if __name__ == "__main__":
    main()
