"""The evaluations of a run: made, kept, the best adapter saved, and the question whether to go on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agzo_edge.config import RunConfig
from agzo_edge.events import Evaluated
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.rundir import JOURNAL_NAME, keep_evaluations
from agzo_edge.train.best import best_step, out_of_patience
from agzo_edge.train.data import ExampleSet
from agzo_edge.train.evaluate import Metrics, evaluate
from agzo_edge.train.guard import Guard
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
        metrics = self.guard.run(
            lambda config: evaluate(
                self.model, examples, objective=config.objective, batch_size=_examples_at_once(config), goal=self.goal
            )
        )
        self.found[step] = metrics
        if save_best and best_step(self.found, self.guard.config.metric_for_best_model) == step:
            save_best()  # first: an evaluation that is on the disk is not made again
        if (self.out / JOURNAL_NAME).exists():  # before the first step nothing is written
            keep_evaluations(self.out, self.found)
        yield Evaluated(step, metrics)

    def say_stop(self) -> bool:
        """Whether there was no better one for as long as the run has patience."""
        patience = self.guard.config.early_stopping_patience
        return out_of_patience(self.found, self.guard.config.metric_for_best_model, patience=patience)


def _examples_at_once(config: RunConfig) -> int:
    """Examples in a pass: as many as a step's pass has, with both signs where they are fused."""
    return (2 if config.fuse_signs else 1) * (config.micro_batch_size or config.batch_size)
