"""Seeing that a run does harm: a rate that is too large shall cost some steps, and not the run.

Now and then a few of the data's examples are scored in a plain pass, the same ones each time: what differs between
examples drops out, and a small rise is seen for what it is. Where the data have enough they are held back from
training, so that learning by heart is seen as well. The learner keeps the best state and goes back to it.
"""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

import numpy as np
import torch

from agzo_edge.config import RunConfig
from agzo_edge.numerics.estimate import standard_errors_above
from agzo_edge.train.data import Example, ExampleSet

MOST_WATCHED, LEAST_WATCHED = 64, 4  # examples; 64 are in a plain pass as much as two steps of 16
WATCHED_SHARE = 1 / 25  # of a run's examples at most, beyond the least: a short run is not kept waiting for its start
HELD_BACK_SHARE = 1 / 10  # of the data at most
ENOUGH_WATCHED = 16  # to tell a small gain from chance
USUAL_BATCH = 16  # where fewer make a step, looks are rarer: they take the same share of a run
CHANCE_ERRORS = 2.0  # standard errors of a mean difference: by chance one look in 44 lies further above, one below
LOST_ERRORS = 8.0  # standard errors of a batch's mean: no batch is by chance so far above the best state's


def is_due(step: int, config: RunConfig) -> bool:
    """Whether the watched examples are scored before `step`."""
    return config.can_go_back and step % (config.undo_every * -(-USUAL_BATCH // config.batch_size)) == 0


def held_back(examples: Sequence[Example], config: RunConfig) -> list[int]:
    """The places of the examples that a run does not train on but watches: none of a few examples.

    It is the data that decide: a run that is made longer holds back the same.
    """
    n_examples = min(MOST_WATCHED, int(HELD_BACK_SHARE * len(examples)))
    if not config.can_go_back or n_examples < ENOUGH_WATCHED:
        return []
    return sorted(_spread_over_answers(examples, n_examples))


def n_watched(data: ExampleSet, config: RunConfig) -> int:
    """How many examples a run watches."""
    return _n_watched(len(data.held_back or data.examples), config)


def _n_watched(n_examples: int, config: RunConfig) -> int:
    """How many of so many."""
    share = int(WATCHED_SHARE * config.max_steps * config.batch_size)
    return min(n_examples, MOST_WATCHED, max(LEAST_WATCHED, share))


def watched_lines(n_lines: int, config: RunConfig) -> list[int]:
    """The lines of a large file whose examples a run watches, evenly spread: it trains on few of them."""
    return _spread(range(n_lines), _n_watched(n_lines, config)) if config.can_go_back else []


def watched_examples(data: ExampleSet, n_examples: int) -> list[Example]:
    """The examples to watch: of those held back, or of all where none are.

    Of a large file, whose rows are not read for that, those of `watched_lines`.
    """
    if data.line_bytes is not None:
        return [data.examples[place] for place in _spread(range(len(data.examples)), n_examples)]
    pool = data.held_back or data.examples
    return [pool[place] for place in _spread_over_answers(pool, n_examples)]


def _spread_over_answers(examples: Sequence[Example], n_examples: int) -> list[int]:
    """The places of so many of them, evenly spread, with each answer's share of a choice as among all.

    A model that leans to one answer gains on its examples what it loses on the others': a few too many of them, and
    that looks like learning.
    """
    return _spread(sorted(range(len(examples)), key=lambda place: examples[place].answer), n_examples)


def _spread(places: Sequence[int], n: int) -> list[int]:
    """So many of them, evenly spread."""
    return [places[int(index)] for index in np.linspace(0, len(places) - 1, num=n)]


def is_harm(losses: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the watched examples' losses lie above those of the best state by more than chance."""
    return bool(best) and _errors_above(losses, best) > CHANCE_ERRORS


def is_gain(losses: Sequence[float], best: Sequence[float], *, of_start: bool) -> bool:
    """Whether a state is better on the watched examples than the best so far; than the start by more than chance."""
    return _errors_above(losses, best) < -(CHANCE_ERRORS if of_start else 0.0)


def has_paid(losses: Sequence[float], best: Sequence[float], *, of_start: bool) -> bool:
    """Whether a run's last state is kept: a run that has not shown that it learns ends where it began.

    A short one, that watches few examples, is given the benefit of the doubt.
    """
    if len(losses) < ENOUGH_WATCHED:
        return not is_harm(losses, best)
    return is_gain(losses, best, of_start=of_start)


def _errors_above(losses: Sequence[float], best: Sequence[float]) -> float:
    """Standard errors of `losses` above those of the best state; infinitely many where one is not finite."""
    if not all(map(math.isfinite, losses)):
        return math.inf
    return standard_errors_above(torch.tensor(losses), torch.tensor(best))


def is_lost(loss: float, best: Sequence[float], *, batch_size: int) -> bool:
    """Whether the loss of one step's examples alone asks for a look at the watched ones."""
    return len(best) > 1 and loss > fmean(best) + LOST_ERRORS * pstdev(best) / math.sqrt(batch_size)
