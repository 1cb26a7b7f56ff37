"""The training loop: it yields records and decides nothing about them."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from agzo_edge.config import RunConfig
from agzo_edge.errors import ModelError, NonFiniteLossError
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.train.data import Batch, ExampleSet, batches_of, longest_examples
from agzo_edge.train.guard import Guard
from agzo_edge.train.learner import Learner
from agzo_edge.train.lookout import Lookout, refuse_bad_rows
from agzo_edge.train.objective import Goal, loss_of
from agzo_edge.train.order import chosen_examples
from agzo_edge.train.probe import MuProbe, probe_mu
from agzo_edge.train.step import StepRecord, agzo_step, begin_window, find_window, measure

REHEARSAL_MU = 1e-3  # any size: only the memory of the passes is looked at


@dataclass(frozen=True)
class TimedStep:
    """A step's record with what it cost."""

    record: StepRecord
    wall_s: float
    tokens: int  # of all rows, padding excluded
    peak_bytes: int  # the most so far
    moves: tuple[str, ...] = ()  # of the guard, before or in this step


def run_steps(
    model: EdgeModel,
    learner: Learner,
    data: ExampleSet,
    *,
    guard: Guard,
    mu: float,
    goal: Goal,
    first_step: int = 0,
    last_loss: float = -math.inf,  # of the step before it
) -> Iterator[TimedStep]:
    """Train, one step for each record that is asked for; stop asking, and training stops.

    The examples of a step depend on the seed and the step's number alone. Where the run has done harm it goes back
    to its best state before the step. Raises NonFiniteLossError when that does not help either, and BudgetBrokenError
    when a step, or the one before it, did not stay within the limit however small its pieces, and DataError for a row
    of a file read as it goes.
    """

    lookout = Lookout(model, learner, data, guard=guard, goal=goal)
    for step in range(first_step, guard.config.max_steps):
        start_s = time.perf_counter()
        seen = lookout.before(step, last_loss=last_loss)
        work = partial(_step, model, learner, data, step=step, mu=mu, goal=goal)
        try:
            record, tokens = guard.run(work)
        except NonFiniteLossError:
            if not lookout.can_retreat(seen):
                raise
            seen = lookout.retreat()
            record, tokens = guard.run(work)
        guard.has_begun = True
        last_loss = record.loss
        ended_at = lookout.after(step)
        record = replace(record, watched=seen.watched, went_back_to=seen.went_back_to, ended_at=ended_at)
        yield TimedStep(record, time.perf_counter() - start_s, tokens, guard.peak_bytes, guard.take_moves())


def _step(
    model: EdgeModel,
    learner: Learner,
    data: ExampleSet,
    config: RunConfig,
    *,
    step: int,
    mu: float,
    goal: Goal,
) -> tuple[StepRecord, int]:
    """A step's record and its tokens."""
    batches = batches_of_step(model, data, step=step, config=config)
    record = agzo_step(model, batches, learner, step=step, mu=mu, config=config, goal=goal)
    return record, sum(int(batch.attention_mask.sum()) for batch in batches)


def batches_of_step(model: EdgeModel, data: ExampleSet, *, step: int, config: RunConfig) -> list[Batch]:
    """The micro-batches of a step: a function of the data, the seed and the step's number."""
    chosen = chosen_examples(data.lengths, step=step, config=config)
    return batches_of([data.examples[index] for index in chosen], model.tokenizer, config)


def rehearse(model: EdgeModel, data: ExampleSet, *, guard: Guard, goal: Goal) -> None:
    """Take the longest rows through all passes of a step, so that what does not fit shows before the start.

    Nothing is learned and the model is left as it was. Raises BudgetError when they fit on no rung.
    """

    def longest_batch(config: RunConfig) -> None:
        batches = batches_of(longest_examples(data, config.batch_size), model.tokenizer, config)
        with bases_kept(model), suppress(NonFiniteLossError):  # told of by whoever looks at the losses themselves
            refresh = begin_window(model, batches, config, goal=goal)
            measure(model, batches, step=0, mu=REHEARSAL_MU, config=config, refresh=refresh, goal=goal)

    guard.rehearse(longest_batch)


@contextmanager
def bases_kept(model: EdgeModel) -> Iterator[None]:
    """After the block, bases, scales and guides are those from before it."""
    before = [(branch, branch.group.basis, branch.scale, branch.guide) for branch in model.branches]
    try:
        yield
    finally:
        for branch, basis, scale, guide in before:
            branch.group.basis, branch.scale, branch.guide = basis, scale, guide


def require_finite(model: EdgeModel, data: ExampleSet, config: RunConfig, *, goal: Goal) -> None:
    """Raise when the model itself, before any perturbation, has no finite loss on the first batch.

    ModelError when no row has one (broken weights), NonFiniteLossError naming the rows otherwise.
    """
    bad: list[str] = []
    places: list[str] = []
    for batch in batches_of_step(model, data, step=0, config=config):
        finite = loss_of(model, batch.to(model.device), goal=goal)[0].isfinite().tolist()
        places += batch.places
        bad += [place for place, ok in zip(batch.places, finite, strict=True) if not ok]
    if bad and len(bad) == len(places):
        raise ModelError(f"{model.source}: gives no finite loss on any row: its weights hold NaN or infinite numbers")
    refuse_bad_rows(bad)


def probed_mu(model: EdgeModel, data: ExampleSet, config: RunConfig, *, goal: Goal) -> MuProbe:
    """The perturbation size for this model, dtype and card, from probes of the first batch.

    The model is left as it was: a run that does not probe, because it is resumed, takes the same steps.
    """
    batches = batches_of_step(model, data, step=0, config=config)
    with bases_kept(model):
        find_window(model, batches, config, goal=goal)
        return probe_mu(lambda mu: measure(model, batches, step=0, mu=mu, config=config, goal=goal)[0].projected)
