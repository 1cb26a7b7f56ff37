"""The directory of a run: what is in it, and how it is read back.

journal.jsonl                  what every step did
bases/step-N.safetensors       what the window of step N fixed
best/                          the adapter that did best on the held-out examples
checkpoint-N/                  the adapter after N steps, and the learner's state
adapter_model.safetensors ...  the result in PEFT's layout, with a card (README.md) and the tokenizer
merged/                        with target = dequantized: the whole model
runs/                          with report_to = tensorboard: its numbers
run.lock                       while a process trains here
evaluations.json               what the held-out examples said, and when
report.json                    what it cost and what it gave
"""

import json
import math
import os
import shlex
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from agzo_edge.config import KEPT_CHECKPOINTS, RunConfig
from agzo_edge.errors import AdapterError, numbered
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.lowrank import LowRank
from agzo_edge.record.adapter import CONFIG_NAME, LowRankPair, load_adapter, save_adapter
from agzo_edge.record.bases import save_bases
from agzo_edge.record.files import aside, atomic_write_bytes, atomic_write_text, sync_directory, writing
from agzo_edge.record.journal import Journal, JournalWriter, read_journal
from agzo_edge.record.lock import LOCK_NAME
from agzo_edge.record.replay_file import COURSE_FIELDS
from agzo_edge.record.strict_json import strict_object
from agzo_edge.record.tensors import checked_bytes
from agzo_edge.train.data import ExampleSet
from agzo_edge.train.evaluate import Metrics
from agzo_edge.train.learner import Learner
from agzo_edge.train.loop import TimedStep

JOURNAL_NAME = "journal.jsonl"
REPORT_NAME = "report.json"
EVALUATIONS_NAME = "evaluations.json"
BEST_NAME = "best"
STATE_NAME = "learner_state.safetensors"
PROMPT_FORM = "prompt_form"  # beside the settings: how the rows asked

# Settings that a resumed run may change; with a difference in any other it would be another run.
_FREE_TO_CHANGE = {
    "output_dir", "profile", "device", "vram_limit", "ram_limit", "on_overflow", "eval_data", "eval_steps",
    "save_steps", "report_to", "max_steps", "model", "data", "metric_for_best_model", "early_stopping_patience",
    "micro_batch_size", "fuse_signs", "mlp_chunk_tokens", "logits_chunk", "offload", "reward_timeout_s",
}  # fmt: skip

_OF_FEW_STEPS = ("left_out", *COURSE_FIELDS)  # what the journal has of a step only where there is something to tell

_MUST_BE_THE_SAME = {
    "base_sha256": "the base model",
    "data_sha256": "the training data",
    "rows_held_back": "the number of rows held back from training",
}


def require_unused(directory: Path, *, flag: str = "--output-dir") -> None:
    """Raise AdapterError, with what to do, when `directory`, which `flag` named, holds anything already."""
    if (directory / JOURNAL_NAME).exists():
        resume = "--resume-from-checkpoint (in Python resume=True)"
        go_on = f"go on with it by {resume}, or " if flag == "--output-dir" else ""
        raise AdapterError(f"{directory} holds another run: {go_on}choose another {flag}")
    if directory.is_symlink() and not directory.exists():
        raise AdapterError(
            f"{directory} is a link to {directory.readlink()}, and nothing is there: choose another {flag}"
        )
    above = (directory, *directory.absolute().parents)
    nearest = next(path for path in above if os.path.exists(path))  # noqa: PTH110  # Path's raises PermissionError
    if not nearest.is_dir():
        raise AdapterError(f"{nearest} is a file: choose another {flag}")
    if not os.access(nearest, os.W_OK):
        raise AdapterError(f"{nearest} cannot be written to: choose another {flag}, or change its permissions")
    if directory.exists() and any(not _is_leftover(path) for path in directory.iterdir()):
        raise AdapterError(f"{directory} is not empty: choose another {flag}")


def _is_leftover(path: Path) -> bool:
    """Whether a run killed before its first step may have left `path` behind."""
    return path.name == LOCK_NAME or path == aside(path.with_name(JOURNAL_NAME))


def header_of(config: RunConfig, model: EdgeModel, data: ExampleSet, *, mu: float) -> dict[str, Any]:
    """The journal's first line: everything a replay or a resume must know or compare."""
    groups = {branch.group.index: branch.group.in_features for branch in model.branches}
    return {
        "config": config.model_dump(mode="json"),
        "mu": mu,
        "base_sha256": model.base_sha256(),
        "data_sha256": data.sha256,
        "rows_held_back": data.report.rows_held_back,
        PROMPT_FORM: data.asking and data.asking.form,
        "layers": [[branch.name, branch.out_features, branch.group.index] for branch in model.branches],
        "group_in_features": [groups[index] for index in sorted(groups)],
        "transposed": model.transposed,
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "numpy")},
    }


def require_same_run(header: Mapping[str, Any], now: Mapping[str, Any], *, directory: Path) -> None:
    """Raise AdapterError naming everything in which the run to resume differs from the one begun."""
    faults = [
        f"{what} has changed since the run began"
        for field, what in _MUST_BE_THE_SAME.items()
        if header.get(field) != now[field]
    ]
    then, wanted = header["config"], now["config"]
    faults += [
        f"{name} was {then.get(name)!r} and is {wanted[name]!r} now"
        for name in sorted(wanted.keys() - _FREE_TO_CHANGE)
        if then.get(name) != wanted[name]
    ]
    if then["lr_schedule"] != "constant" and then["max_steps"] != wanted["max_steps"]:
        faults.append(
            f"max_steps was {then['max_steps']}, and the {then['lr_schedule']} schedule depends on it: to learn more, "
            f"begin another run with --adapter {shlex.quote(str(directory))}"
        )
    if faults:
        raise AdapterError(f"{directory}: this run cannot be resumed:\n" + numbered(faults))


def keep_step(directory: Path, journal: JournalWriter, timed: TimedStep, learner: Learner) -> None:
    """Put a step on the disk: its window's bases first, then its line; after that the step counts."""
    record = timed.record
    if learner.window_starts(record.step):
        save_bases(directory, record.step, learner.window())
    journal.append(
        {
            "step": record.step,
            "loss": record.loss,
            "learning_rate": record.learning_rate,
            "mu": record.mu,
            "projected": record.projected,
            "weights": record.weights,
            "label_tokens": record.label_tokens,
            "tokens": timed.tokens,
            "wall_s": round(timed.wall_s, 6),
            "peak_bytes": timed.peak_bytes,
            **{name: told for name in _OF_FEW_STEPS if (told := getattr(record, name)) is not None},
        }
    )


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is kept."""
    return directory / f"checkpoint-{step}"


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps of the whole checkpoints in `directory`, ascending."""
    names = (path.parent.name.removeprefix("checkpoint-") for path in directory.glob(f"checkpoint-*/{STATE_NAME}"))
    return sorted(int(name) for name in names if name.isdecimal())


def save_checkpoint(directory: Path, learner: Learner, header: Mapping[str, Any], *, step: int, card: str) -> Path:
    """Leave the adapter and the learner's state after `step` steps; old checkpoints make room.

    The state comes last: a checkpoint without it does not count.
    """
    path = checkpoint_path(directory, step)
    save_result(path, learner, header, card=card)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in learner.state().items()}
    atomic_write_bytes(path / STATE_NAME, checked_bytes(state))
    for old in [step for step in checkpoint_steps(directory) if step > 0][:-KEPT_CHECKPOINTS]:
        _discard(checkpoint_path(directory, old))
    return path


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint; first what makes it one, so that a kill in between leaves none that is half."""
    with writing(checkpoint):
        for name in (STATE_NAME, CONFIG_NAME):
            (checkpoint / name).unlink(missing_ok=True)
        sync_directory(checkpoint)
        shutil.rmtree(checkpoint)


def discard_halves(directory: Path) -> None:
    """Remove the checkpoints whose writing, or removal, was cut short: nothing would ever read them.

    A tokenizer's folder is one that was there for a moment.
    """
    for path in directory.glob(".tokenizer-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdecimal() and not (path / STATE_NAME).exists():
            _discard(path)


def save_result(
    directory: Path,
    learner: Learner,
    header: Mapping[str, Any],
    *,
    card: str,
    extra_files: Mapping[str, bytes] | None = None,  # name: content, the tokenizer's
) -> None:
    """Leave the adapter as it is now in `directory`, in PEFT's layout."""
    save_adapter(
        directory,
        {name: LowRankPair(a=change.a.mT, b=change.c) for name, change in learner.adapter().items()},
        base_model=header["config"]["model"],
        transposed=header["transposed"],
        card=card,
        extra_files=extra_files,
    )


def load_changes(directory: Path) -> dict[str, LowRank]:
    """The weight changes of the adapter in `directory`, by layer. Raises AdapterError."""
    require_ended(directory)
    return {name: LowRank(c=pair.b, a=pair.a.mT) for name, pair in load_adapter(directory).items()}


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Leave report.json."""
    atomic_write_text(directory / REPORT_NAME, json.dumps(report, indent=2) + "\n")


def withdraw_report(directory: Path) -> None:
    """Remove report.json, of a finished run that is now made longer."""
    with writing(directory):
        (directory / REPORT_NAME).unlink(missing_ok=True)


def keep_evaluations(directory: Path, evaluations: Mapping[int, Metrics], *, data_sha256: str) -> None:
    """Leave what every evaluation on some data found, so that a resumed run still knows where it came from."""
    found = {str(step): metrics.as_json() for step, metrics in sorted(evaluations.items())}
    kept = {"data_sha256": data_sha256, "evaluations": found}
    atomic_write_text(directory / EVALUATIONS_NAME, json.dumps(kept, indent=2) + "\n")


def kept_evaluations(directory: Path, *, data_sha256: str) -> dict[int, Metrics] | None:
    """What the run's evaluations on this data found, by step; None where they were made on other data.

    Raises AdapterError for a damaged file.
    """
    path = directory / EVALUATIONS_NAME
    if not path.is_file():
        return {}
    try:
        kept = strict_object(path.read_bytes())
        found = {int(step): _metrics(told) for step, told in kept["evaluations"].items()}
        if kept["data_sha256"] != data_sha256:
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"{path}: cannot be read: {error}. Without it the run goes on, and begins to score anew"
        ) from None
    if wrong := [step for step, metrics in found.items() if step < 0 or not _are_numbers(metrics)]:
        raise AdapterError(f"{path}: the evaluation at step {wrong[0]} holds something else than numbers")
    return found


def _metrics(told: Mapping[str, Any]) -> Metrics:
    """What an evaluation found, from JSON, where a number that is not finite is null."""
    spans = {name: [math.nan if x is None else x for x in span] for name, span in told["intervals"].items()}
    return Metrics(**{**told, "loss": math.nan if told["loss"] is None else told["loss"], "intervals": spans})


def _are_numbers(metrics: Metrics) -> bool:
    """Whether each field has the type it should have."""
    if type(metrics.examples) is not int or not isinstance(metrics.intervals, dict):
        return False
    told = [metrics.loss, *(x for x in (metrics.accuracy, metrics.macro_f1, metrics.reward) if x is not None)]
    spans = list(metrics.intervals.values())
    pairs = all(isinstance(span, list) and len(span) == 2 for span in spans)
    return pairs and all(type(x) in (int, float) for x in chain(told, *spans))


def require_ended(directory: Path) -> None:
    """Raise AdapterError, with what to do, where a run in `directory` has left no adapter yet."""
    if (directory / JOURNAL_NAME).is_file() and not (directory / CONFIG_NAME).is_file():
        raise AdapterError(
            f"{directory}: the run has not ended: go on with it by `train --resume-from-checkpoint`, or make the "
            f"adapter of its steps so far with `agzo-edge replay {shlex.quote(str(directory))}`"
        )


def read_run(directory: Path) -> Journal:
    """The journal of the run in `directory`. Raises AdapterError when there is none."""
    if not (directory / JOURNAL_NAME).is_file():
        raise AdapterError(f"{directory}: no {JOURNAL_NAME}: this is not the directory of a run")
    return read_journal(directory / JOURNAL_NAME)
