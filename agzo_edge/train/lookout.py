"""Looking for harm in a run, and going back from it: what undo.py decides, done."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from agzo_edge.config import RunConfig
from agzo_edge.errors import BudgetBrokenError, DataError, NonFiniteLossError
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.train.data import Example, ExampleSet, batches_of
from agzo_edge.train.guard import Guard
from agzo_edge.train.learner import Learner
from agzo_edge.train.objective import Goal, loss_of
from agzo_edge.train.undo import has_paid, is_due, is_harm, is_lost, n_watched, watched_examples


@dataclass(frozen=True)
class Look:
    """What was seen before a step, and what was done about it."""

    watched: tuple[float, ...] | None = None  # the watched examples' losses; None where nobody looked, or went back
    went_back_to: int | None = None  # the steps of the best state, where the run is in it again


class Lookout:
    """Watches a few examples, and takes the learner back to its best state when the run has done harm."""

    def __init__(self, model: EdgeModel, learner: Learner, data: ExampleSet, *, guard: Guard, goal: Goal) -> None:
        self._model, self._learner, self._data = model, learner, data
        self._guard, self._goal = guard, goal

    def before(self, step: int, *, last_loss: float) -> Look:
        """Look where it is time to, or where the last step's loss asks for it; then go back, or remember the state.

        Raises NonFiniteLossError at the first look, naming the rows on which the model itself has no finite loss.
        """
        learner, config = self._learner, self._guard.config
        if not is_due(step, config) and not is_lost(last_loss, learner.watched, batch_size=config.batch_size):
            return Look()
        losses = self._losses()
        if is_harm(losses, learner.watched):
            return Look(went_back_to=learner.go_back())
        learner.watch(losses, step=step)
        return Look(watched=losses)

    def can_retreat(self, seen: Look) -> bool:
        """Whether there is a better state than the one that `seen` was seen of."""
        return seen.went_back_to is None and self._learner.watched not in ((), seen.watched)

    def retreat(self) -> Look:
        """Go back without a look: a step from here gave no finite loss."""
        return Look(went_back_to=self._learner.go_back())

    def after(self, step: int) -> int | None:
        """After the run's last step look once more, and go back where it has not paid.

        The steps of the state that it went back to, or None.
        """
        if not self._learner.watched or step != self._guard.config.max_steps - 1:
            return None
        with suppress(BudgetBrokenError, DataError):  # the step is made: without a look it counts as it is
            if not has_paid(self._losses(), self._learner.watched, of_start=self._learner.is_best_at_start):
                return self._learner.go_back()
        return None

    @cached_property
    def _examples(self) -> list[Example]:
        """Those that are watched; a resumed run watches as many as before."""
        return watched_examples(self._data, len(self._learner.watched) or n_watched(self._data, self._guard.config))

    def _losses(self) -> tuple[float, ...]:
        losses = self._guard.run(partial(watched_losses, self._model, self._examples, goal=self._goal))
        if not self._learner.watched:
            pairs = zip(self._examples, losses, strict=True)
            refuse_bad_rows([example.place for example, loss in pairs if not math.isfinite(loss)])
        return losses


def watched_losses(
    model: EdgeModel, examples: Sequence[Example], config: RunConfig, *, goal: Goal
) -> tuple[float, ...]:
    """The loss of each example, as the model is now."""
    batches = batches_of(examples, model.tokenizer, config)
    parts = [loss_of(model, batch.to(model.device), goal=goal)[0] for batch in batches]
    return tuple(torch.cat(parts).tolist())


def refuse_bad_rows(places: Sequence[str]) -> None:
    """Raise NonFiniteLossError naming the rows on which the model itself has no finite loss, if there are any."""
    if places:
        raise NonFiniteLossError(
            f"the model's own loss, before training, is not finite on {', '.join(places[:5])}: leave these rows out, "
            f"or try --dtype float32"
        )
