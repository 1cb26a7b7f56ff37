"""What a watcher remembers of a run: enough to draw where it stands. No terminal, no torch."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # these modules import torch, and a --help must not wait for it
    from agzo_edge.events import Event, Planned
    from agzo_edge.train.evaluate import Metrics
    from agzo_edge.train.loop import TimedStep

RECENT_STEPS = 20  # over which loss and speed are smoothed


@dataclass
class Course:
    """The run so far, as far as its events have told."""

    planned: "Planned | None" = None
    prompt: str = ""  # of the data, to try the result with
    doing: str = "reading the data"
    first_step: int = 0
    steps_done: int = 0  # those before a resumed run's start included
    peak_bytes: int = 0
    evaluations: "dict[int, Metrics]" = field(default_factory=dict)  # by steps done
    recent: "deque[TimedStep]" = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    start_s: float = field(default_factory=time.monotonic)
    training_start_s: float | None = None

    def take(self, event: "Event") -> None:
        """Remember what `event` tells."""
        from agzo_edge import events

        match event:
            case events.Planned():
                self.planned, self.doing = event, "loading the model"
            case events.DataReady(asking=asking):
                self.prompt = asking.prompt if asking else ""
                self.doing = "planning"
            case events.ModelReady(first_step=first_step):
                self.first_step = self.steps_done = first_step
                self.doing = "measuring the untrained model"
            case events.Evaluated(step=step, metrics=metrics):
                self.evaluations[step] = metrics
            case events.Stepped(timed=timed):
                self._take_step(timed)

    def _take_step(self, timed: "TimedStep") -> None:
        if self.training_start_s is None:
            self.training_start_s = time.monotonic() - timed.wall_s
        self.steps_done = timed.record.step + 1
        self.peak_bytes = max(self.peak_bytes, timed.peak_bytes)
        self.recent.append(timed)
        self.doing = "training" if self.steps_done < self.n_steps else "measuring and saving the result"

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.planned.config.max_steps if self.planned else 0

    @property
    def measure(self) -> str:
        """What a step's number is."""
        return "reward" if self.planned and self.planned.config.objective == "reward" else "loss"

    def told(self, loss: float) -> float:
        """A loss as a person is told it: of a reward the other sign."""
        return 0.0 - loss if self.measure == "reward" else loss  # never minus zero

    @property
    def recent_mean(self) -> float | None:
        """The mean training loss, or reward, of the recent steps."""
        return self.told(sum(timed.record.loss for timed in self.recent) / len(self.recent)) if self.recent else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of the data learned from in a second of the recent steps."""
        wall_s = sum(timed.wall_s for timed in self.recent)
        return sum(timed.tokens for timed in self.recent) / wall_s if wall_s > 0 else None

    @property
    def elapsed_s(self) -> float:
        """Since the watcher began."""
        return time.monotonic() - self.start_s

    @property
    def remaining_s(self) -> float | None:
        """For the steps still to do, at this run's mean pace, evaluations included."""
        done = self.steps_done - self.first_step
        if self.training_start_s is None or done == 0:
            return None
        return (time.monotonic() - self.training_start_s) / done * (self.n_steps - self.steps_done)

    @property
    def held_out_losses(self) -> list[float]:
        """The held-out loss of every evaluation so far, in order."""
        return [self.evaluations[step].loss for step in sorted(self.evaluations)]
