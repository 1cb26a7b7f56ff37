"""A learner brought to where a run was: from its directory, or from one file."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from agzo_edge.config import RunConfig
from agzo_edge.errors import AdapterError, ConfigError
from agzo_edge.model.branch import Branch, make_branches
from agzo_edge.record.bases import WindowBases, load_bases
from agzo_edge.record.journal import Journal
from agzo_edge.record.replay_file import ReplayFile, load_replay
from agzo_edge.record.tensors import read_checked
from agzo_edge.rundir import STATE_NAME, checkpoint_path, checkpoint_steps, read_run
from agzo_edge.train.learner import Learner
from agzo_edge.train.replay import replay

MOST_THREADS = 1024  # more, and a damaged header could ask for what the system refuses by ending the process


def branches_of(header: Mapping[str, Any], *, device: torch.device | str = "cpu") -> list[Branch]:
    """Untouched branches for the layers that a journal's header names: a replay needs no model."""
    layers = [(str(name), int(out_features), int(group)) for name, out_features, group in header["layers"]]
    config = header["config"]
    widths = header["group_in_features"]
    return make_branches(layers, widths, rank=int(config["rank"]), guided=config["guide"] == "head", device=device)


def bring_up_to(
    learner: Learner,
    directory: Path,
    journal: Journal,
    *,
    until_step: int | None = None,
    from_start: bool = False,
    skip: Container[int] = (),
) -> int:
    """Bring `learner` to where the journal ends, or to `until_step` steps; the number of steps it then knows.

    The newest checkpoint that is not beyond that point is where it begins, the journal does the rest; with
    `from_start` the journal does all. (checkpoint-0 is the start of a run that went on with an adapter.)
    Raises AdapterError for a damaged file.
    """
    end = _end(until_step, journal.next_step)
    first = 0
    from_start = from_start or learner.config.target == "dequantized"  # a checkpoint has no held weights
    for step in reversed(checkpoint_steps(directory)):
        if step <= (0 if from_start else end):
            _restore(learner, checkpoint_path(directory, step))
            first = step
            break

    _require_steps(skip, end)
    shapes = window_shapes(learner)
    with _of_one_run(directory):
        replay(learner, journal.records[first:end], lambda step: load_bases(directory, step, shapes), skip=skip)
        _require_finite(learner)
    return end


def _require_steps(skip: Container[int], n_steps: int) -> None:
    """Raise ConfigError for steps to leave out of which the run has none."""
    if skip and not any(step in skip for step in range(n_steps)):
        raise ConfigError(f"--skip names none of the run's {n_steps} steps")


def _require_finite(learner: Learner) -> None:
    """Raise ValueError for an adapter that cannot be written."""
    tensors = (tensor for b in learner.branches for tensor in (b.c, b.folded.c, b.folded.a))
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError("the steps lead to NaN or infinite weights")


def _restore(learner: Learner, checkpoint: Path) -> None:
    try:
        state = read_checked(checkpoint / STATE_NAME)
    except AdapterError as error:
        hint = "" if checkpoint.name == "checkpoint-0" else f", or remove {checkpoint}: the journal gives the same"
        raise AdapterError(f"{error}{hint}") from None
    with _of_one_run(checkpoint / STATE_NAME):
        learner.restore(state)


@contextmanager
def _of_one_run(source: Path | str) -> Iterator[None]:
    """A block in which records, state and layers meet; where they do not fit each other it is an AdapterError."""
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise AdapterError(
            f"{source}: its parts are not those of one run: {type(error).__name__}: {str(error)[:200]!r}"
        ) from error


def window_shapes(learner: Learner) -> dict[str, tuple[int, ...]]:
    """The shapes of what a window of this learner fixes, by the names in its file."""
    shapes: dict[str, tuple[int, ...]] = {"scales": (len(learner.branches),)}
    for branch in learner.branches:
        shapes[f"basis.{branch.group.index}"] = (branch.group.in_features, branch.group.rank)
        if branch.guide is not None:
            shapes[f"guide.{branch.index}"] = tuple(branch.guide.shape)
    return shapes


def replay_file_of(directory: Path) -> ReplayFile:
    """The run in `directory` as one file holds it. Raises AdapterError for a damaged run."""
    journal = read_run(directory)
    learner = learner_of(journal.header)
    steps = [record["step"] for record in journal.records if learner.window_starts(record["step"])]
    windows = {step: load_bases(directory, step, window_shapes(learner)) for step in steps}
    start = checkpoint_path(directory, 0) / STATE_NAME
    return ReplayFile(journal.header, journal.records, windows, read_checked(start) if start.is_file() else {})


def _end(until_step: int | None, n_steps: int) -> int:
    """The step to end at, by default after the last. Raises ConfigError for one that the run has not."""
    if until_step is not None and not 0 <= until_step <= n_steps:
        raise ConfigError(f"--until-step is {until_step}, and the run has {n_steps} steps")
    return n_steps if until_step is None else until_step


def learner_of(header: Mapping[str, Any]) -> Learner:
    """The learner of the run that a journal's header describes, before its first step; it computes where the run did.

    Without its GPU on the CPU, where the last bits differ.
    """
    with _of_one_run("the journal's header"):
        compute_as_begun(header)
        device = "cuda" if header["device"] == "cuda" and torch.cuda.is_available() else "cpu"
        return Learner(branches_of(header, device=device), RunConfig(**header["config"]))


def compute_as_begun(header: Mapping[str, Any]) -> None:
    """Let torch have as many threads as when the run began: the last bits of a product depend on them.

    Raises ValueError for a number that no run has had.
    """
    threads = int(header.get("threads", torch.get_num_threads()))
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"{threads} threads")
    torch.set_num_threads(threads)


def rebuilt(run: ReplayFile, *, until_step: int | None = None, skip: Container[int] = ()) -> Learner:
    """The learner after the run's steps, or the first `until_step`. Raises AdapterError for a damaged file."""
    learner = learner_of(run.header)
    records = run.records[: _end(until_step, len(run.records))]
    _require_steps(skip, len(records))

    def bases_of(step: int) -> WindowBases:
        window = run.windows.get(step)
        shapes = {} if window is None else {name: tuple(t.shape) for name, t in window.tensors().items()}
        if window is None or shapes != window_shapes(learner):
            raise AdapterError(f"the file does not hold the bases of the window at step {step}")
        return window

    with _of_one_run("the replay file"):
        if run.start:
            learner.restore(run.start)
        replay(learner, records, bases_of, skip=skip)
        _require_finite(learner)
    return learner


def learned_in(
    source: Path, *, until_step: int | None = None, skip: Container[int] = ()
) -> tuple[Learner, Mapping[str, Any]]:
    """The learner after a run, replayed from its directory or its file, and the run's header. Raises AdapterError."""
    if source.is_file():
        kept = load_replay(source)
        return rebuilt(kept, until_step=until_step, skip=skip), kept.header
    journal = read_run(source)
    learner = learner_of(journal.header)
    bring_up_to(learner, source, journal, until_step=until_step, from_start=True, skip=skip)
    return learner, journal.header
