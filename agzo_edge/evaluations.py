"""The evaluations of a run: made, kept, the best adapter saved, and the question whether to go on."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agzo_edge.config import RunConfig
from agzo_edge.events import Evaluated
from agzo_edge.model.branch import cut_to
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.rundir import BEST_NAME, JOURNAL_NAME, keep_evaluations, kept_evaluations
from agzo_edge.train.best import best_step, out_of_patience
from agzo_edge.train.data import Example, ExampleSet
from agzo_edge.train.evaluate import Metrics, evaluate
from agzo_edge.train.guard import Guard
from agzo_edge.train.lookout import refuse_bad_rows
from agzo_edge.train.objective import Goal


@dataclass
class Evaluations:
    """What held-out examples say of a model while it learns; nothing where there are none."""

    guard: Guard
    model: EdgeModel
    goal: Goal
    held_out: ExampleSet | None
    found: dict[int, Metrics]  # by steps done
    out: Path

    def is_due(self, step: int) -> bool:
        """Whether one is made after `step` steps."""
        every = self.guard.config.eval_steps
        return step == 0 or (every > 0 and step % every == 0)

    def made(self, step: int, save_best: Callable[[], object] | None = None) -> Iterator[Evaluated]:
        """The evaluation after `step` steps, unless it is there already; the best so far is saved."""
        if self.held_out is None or step in self.found:
            return
        examples = self.held_out.examples
        with cut_to(self.model.branches, self.guard.config.adapter_rank):  # what is saved is what was scored
            metrics = metrics_of(self.model, examples, self.goal, guard=self.guard)
        if step == 0 and not math.isfinite(metrics.loss):
            refuse_bad_rows([example.place for example in examples if not self._is_finite_on(example)])
        self.found[step] = metrics
        if save_best and best_step(self.found, self.guard.config.metric_for_best_model) == step:
            save_best()  # first: an evaluation that is on the disk is not made again
        if (self.out / JOURNAL_NAME).exists():  # before the first step nothing is written
            self.keep()
        yield Evaluated(step, metrics)

    def keep(self) -> None:
        """Leave what was found in the run's directory."""
        if self.held_out is not None:
            keep_evaluations(self.out, self.found, data_sha256=self.held_out.sha256)

    def take_up(self) -> None:
        """Go on from what a run in the directory has found on the same data; the best by other data is let go."""
        if self.held_out is None:
            return
        self.found |= kept_evaluations(self.out, data_sha256=self.held_out.sha256) or {}
        if not self.found:
            shutil.rmtree(self.out / BEST_NAME, ignore_errors=True)

    def _is_finite_on(self, example: Example) -> bool:
        objective = self.guard.config.objective
        alone = evaluate(self.model, [example], objective=objective, batch_size=1, goal=self.goal)
        return math.isfinite(alone.loss)

    def should_stop(self) -> bool:
        """Whether there was no better one for as long as the run has patience."""
        patience = self.guard.config.early_stopping_patience
        return out_of_patience(self.found, self.guard.config.metric_for_best_model, patience=patience)


def metrics_of(model: EdgeModel, examples: Sequence[Example], goal: Goal, *, guard: Guard) -> Metrics:
    """What the examples say of a model, inside the guard's budget."""
    return guard.run(
        lambda config: evaluate(
            model, examples, objective=config.objective, batch_size=_examples_at_once(config), goal=goal
        )
    )


def _examples_at_once(config: RunConfig) -> int:
    """Examples in a pass: as many as a step's pass has, with both signs where they are fused."""
    return (2 if config.fuse_signs else 1) * (config.micro_batch_size or config.batch_size)
