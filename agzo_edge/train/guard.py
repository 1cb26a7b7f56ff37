"""Keeping a run inside its memory: a rung down the ladder when it gets scarce, and up again when it comes back."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from agzo_edge.budget.ladder import rung_words
from agzo_edge.budget.plan import Rung
from agzo_edge.config import RunConfig
from agzo_edge.errors import BudgetBrokenError, BudgetError
from agzo_edge.model.memory import PeakMeter, capped, free_bytes, total_bytes, used_bytes
from agzo_edge.model.offload import settle
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.units import format_bytes

SPARE_SHARE = 0.02  # of the memory that there is, left to others: below it a desktop begins to swap
PATIENCE_STEPS = 10  # that memory must have been plentiful before a rung up is tried
UP_MARGIN = 1.1  # of what that rung needs, or the next step would go down again

T = TypeVar("T")


class Guard:
    """The rung that a run stands on, and the limits it keeps to.

    A rung is taken before a step by what is free now, and in a step when an allocation meets the cap: the step is
    then taken again from its beginning, with the same noise. Other programs may come and go meanwhile.
    """

    def __init__(self, model: EdgeModel, rungs: Sequence[Rung]) -> None:
        self.model = model
        self.rungs = rungs
        self.limit_bytes = rungs[0].plan.limit_bytes
        self.peak_bytes = 0
        self.has_begun = False  # whether a step was taken: what does not fit before is a refusal, after it a breach
        self._moves: list[str] = []  # what was done and why
        self._spare_bytes = round(SPARE_SHARE * total_bytes(model.device))
        self._place = 0
        self._measured_bytes: dict[int, int] = {}  # the largest peak of each rung
        self._plan_error = 1.0  # the most that a rung took of what was planned for it, or 1
        self._calm_steps = 0

    @property
    def config(self) -> RunConfig:
        """The run as it is done on this rung."""
        return self.rungs[self._place].config

    def take_moves(self) -> tuple[str, ...]:
        """Where it has moved since this was last asked, and why."""
        moves, self._moves = tuple(self._moves), []
        return moves

    def run(self, work: Callable[[RunConfig], T]) -> T:
        """What `work` gives on the rung that fits now.

        `work` may be called again, and must leave nothing behind when it raises BudgetBrokenError. Raises that when
        even the lowest rung does not fit, or BudgetError before the first step.
        """
        self._look_around()
        while True:
            meter = PeakMeter(self.model.device)
            try:
                with capped(self.model.device, self.limit_bytes):
                    return work(self.config)
            except BudgetBrokenError:
                pass  # the error is not kept: its traceback holds the tensors of the work that failed
            finally:
                self._saw(meter)
            if self._allowed_bytes() >= self.limit_bytes:  # nobody else's doing: it never fits
                self._measured_bytes[self._place] = self.limit_bytes + 1
            self._down(f"it met the limit of {format_bytes(self.limit_bytes)}")

    def _saw(self, meter: PeakMeter) -> None:
        meter.read()
        self.peak_bytes = max(self.peak_bytes, meter.peak_bytes)
        self._measured_bytes[self._place] = max(self._measured_bytes.get(self._place, 0), meter.peak_bytes)
        self._plan_error = max(self._plan_error, meter.peak_bytes / self.rungs[self._place].plan.device_bytes)

    def _allowed_bytes(self) -> int:
        """What we may take in all: the limit, or what we have and others leave."""
        device = self.model.device
        return min(self.limit_bytes, used_bytes(device) + free_bytes(device) - self._spare_bytes)

    def rehearse(self, work: Callable[[RunConfig], object]) -> None:
        """Find the first rung on which `work`, the worst that can come, stays within the limit.

        Raises BudgetError when there is none: nothing has been learned yet.
        """
        self.run(work)
        while self._measured_bytes[self._place] > self.limit_bytes:
            self.run(work)

    def _look_around(self) -> None:
        """Step down when this rung needs more than is allowed now, and up when a faster one has fitted for a while."""
        if self._measured_bytes.get(self._place, 0) > self.limit_bytes:
            self._down(f"it took {format_bytes(self._need(self._place))} of {format_bytes(self.limit_bytes)} allowed")
        allowed = self._allowed_bytes()
        if self._need(self._place) > allowed:
            fitting = (place for place in range(self._place + 1, len(self.rungs)) if self._need(place) <= allowed)
            self._move(next(fitting, len(self.rungs) - 1), f"only {format_bytes(max(0, allowed))} are left to it")
            return
        faster = [place for place in range(self._place) if UP_MARGIN * self._need(place) <= allowed]
        self._calm_steps = self._calm_steps + 1 if faster else 0
        if self._calm_steps >= PATIENCE_STEPS:
            self._move(faster[0], f"{format_bytes(allowed)} are free for it again")

    def _need(self, place: int) -> int:
        """The bytes of a rung: measured where it has been, else planned, corrected by how wrong a plan has been."""
        if place in self._measured_bytes:
            return self._measured_bytes[place]
        return round(self._plan_error * self.rungs[place].plan.device_bytes)

    def _down(self, why: str) -> None:
        """Take the next rung. Raises BudgetBrokenError, or BudgetError before the first step, when this is the last."""
        if self._place + 1 == len(self.rungs):
            planned_bytes = self.rungs[self._place].plan.device_bytes
            need = (
                f"the run does not fit its limit of {format_bytes(self.limit_bytes)}, planned "
                f"{format_bytes(planned_bytes)}, and there is no smaller way to go on ({why})"
            )
            advice = "--on-overflow stream, a smaller --micro-batch-size"
            if not self.has_begun:
                raise BudgetError(
                    f"{need}. Nothing was learned; try {advice}, a smaller --max-seq-length, or a higher limit"
                )
            raise BudgetBrokenError(
                f"{need}. What was learned is saved: go on with --resume-from-checkpoint and "
                f"{advice}, or a higher limit"
            )
        self._move(self._place + 1, why)

    def _move(self, place: int, why: str) -> None:
        if place == self._place:
            return
        self._place, self._calm_steps = place, 0
        settle(self.model, self.config)
        self._moves.append(f"{rung_words(self.rungs[0].config, self.config)}: {why}")
