"""What a run has learned so far, and how a step's numbers change it.

The learner needs no model: from the same bases and the same projected gradients it reaches the same
coefficients, bit for bit, which is what replay and resume stand on.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from agzo_edge.config import N_MOMENTS, AgzoConfig
from agzo_edge.model.branch import Branch
from agzo_edge.model.device import sent
from agzo_edge.numerics.estimate import Spread, clipped, gradient_estimate, mean_square
from agzo_edge.numerics.lowrank import LowRank
from agzo_edge.numerics.noise import rounding_bits
from agzo_edge.numerics.update import direction, reprojected, scheduled_rate
from agzo_edge.record.bases import WindowBases
from agzo_edge.train.undo import is_gain

TRUST = 0.25  # of the loss: no step is meant to change more of it (docs/decisions/0037)
RATE_AFTER_UNDO = 1 / 3  # about half a decade: the next try is a clearly different one
_BEST = "best."  # before the names of a state's tensors that belong to the best one so far


@dataclass(frozen=True)
class Measurement:
    """What the forward passes of one step found out."""

    projected: Tensor  # (directions,) float32 on the CPU: projected gradients
    weights: Tensor  # (directions,) float32, sum to 1: each direction's share of the loss


class Learner:
    """The branches, the spread of the projected gradients, and the update rule."""

    def __init__(self, branches: Sequence[Branch], config: AgzoConfig) -> None:
        self.branches = list(branches)
        self.config = config
        self.spread = Spread()
        self.rate_factor = 1.0  # of the scheduled rate; smaller after steps were taken back
        self.watched: tuple[float, ...] = ()  # the watched examples' losses in the best state so far
        self.best_step = 0  # the steps of which that state is the result
        self._best: dict[str, Tensor] = {}  # and itself, as `_present` gives it, on the CPU
        self._old_bases: dict[int, Tensor] = {}

    def window_starts(self, step: int) -> bool:
        """Whether the bases are found anew at `step`."""
        every = self.config.refresh_every
        return step == 0 if every == 0 else step % every == 0

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Inside, an error or an interrupt puts windows, bases, scales and moments back to where they were."""
        before = [(b.folded, b.c, b.steps_in_window, b.group.basis, b.scale, b.guide, b.moments) for b in self.branches]
        try:
            yield
        except BaseException:
            for b, (folded, c, steps, basis, scale, guide, moments) in zip(self.branches, before, strict=True):
                b.group.basis, b.scale, b.guide, b.moments = basis, scale, guide, moments
                if b.held is None:  # a window written into a held weight stays there, and c is empty
                    b.folded, b.c, b.steps_in_window = folded, c, steps
            raise

    def close_window(self, step: int) -> float:
        """Fold every branch's window before `step`; the largest share of energy that a compression left out."""
        self._old_bases = {branch.group.index: branch.group.basis for branch in self.branches}
        return max(self._fold(branch, step) for branch in self.branches)

    def _fold(self, branch: Branch, step: int) -> float:
        def random_bits() -> Tensor:
            bits = rounding_bits(branch.shape, seed=self.config.seed, step=step, layer=branch.index)
            return bits.to(branch.c.device)

        return branch.fold(keep_rank=self.config.adapter_rank, random_bits=random_bits)

    def open_window(self) -> None:
        """Carry the optimizer's state into the new bases, once they are found."""
        for branch in self.branches:
            if self.config.optimizer == "momentum" and branch.moments:
                old = self._old_bases[branch.group.index]
                branch.moments = [reprojected(m, old, branch.group.basis) for m in branch.moments]
            else:  # Adam's second moment has no meaning in another basis
                branch.moments = [torch.zeros_like(branch.c) for _ in range(N_MOMENTS[self.config.optimizer])]

    def enter(self, window: WindowBases) -> None:
        """Take what a window fixed as it is, in place of finding it."""
        for branch, scale in zip(self.branches, window.scales, strict=True):
            branch.group.basis = window.bases[branch.group.index].to(branch.c.device)
            branch.scale = scale
            if branch.guide is not None:
                branch.guide = window.guides[branch.index].to(branch.c.device)

    def window(self) -> WindowBases:
        """What the present window fixed."""
        return WindowBases(
            bases={branch.group.index: branch.group.basis for branch in self.branches},
            scales=[branch.scale for branch in self.branches],
            guides={branch.index: branch.guide for branch in self.branches if branch.guide is not None},
        )

    def learning_rate(self, step: int, *, longest: float = math.inf) -> float:
        """The scheduled learning rate at `step`, less what was lost by going back; its peak is `longest` at most."""
        config = self.config
        return self.rate_factor * scheduled_rate(
            step,
            peak=min(config.learning_rate, longest),
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            max_steps=config.max_steps,
        )

    def longest_rate(self, measured: Measurement, *, loss: float) -> float:
        """The learning rate at which a step changes the loss by TRUST of itself, by the slopes that it has measured.

        A choice's loss can be a hundred times as steep in relative changes of the layers' outputs as a text's. Infinite
        where steps are not normalized: they have their own length then. Momentum takes a step again and again, until
        1 / (1 − momentum) of it is taken; how far Adam and signs go does not depend on slopes, and this is a guess.
        """
        config = self.config
        steepness = math.sqrt(mean_square(self._clipped(measured.projected)))
        own_share = 1.0 - config.momentum if config.optimizer == "momentum" else 1.0
        return own_share * TRUST * abs(loss) / steepness if config.normalize and steepness > 0 else math.inf

    @property
    def is_best_at_start(self) -> bool:
        """Whether no later state was better than the one that the run began with."""
        return self.best_step == 0

    def watch(self, losses: Sequence[float], *, step: int) -> None:
        """Remember the state before `step` if it is the best so far on the watched examples."""
        if not self.watched or is_gain(losses, self.watched, of_start=self.is_best_at_start):
            self.watched, self.best_step = tuple(losses), step
            self._best = {name: tensor.cpu() for name, tensor in self._present().items()}

    def go_back(self) -> int:
        """Restore the best state so far, bit for bit, and cut the rate; the number of steps that state has seen.

        Raises ValueError when no state was remembered.

        Source: DESIGN section 2, the exact undo. The state is kept rather than replayed: it is small, and the base
        is never written to.
        """
        if not self._best:
            raise ValueError("there is no state to go back to")
        window = self.window()
        self._restore_present(self._best)
        if self.is_best_at_start:  # a state from before the first window: the present one goes on, with nothing learned
            self.enter(window)
            self.open_window()
        self.rate_factor *= RATE_AFTER_UNDO
        return self.best_step

    def apply(self, step: int, measured: Measurement, *, learning_rate: float, move: bool = True) -> None:
        """Move every branch's coefficients: C ← C − lr · s · direction(sum_b w_b g_b R_b / v).

        Without `move` the step is only seen, by the spread v, and its part of the sum is left out. All that takes
        memory comes before the first change: a step that runs out of it has changed nothing, and may be taken again.
        """
        projected = self._clipped(measured.projected)
        spread = self.spread.with_step(projected)
        shares = measured.weights * (spread.normalized(projected) if self.config.normalize else projected)
        on_device = sent(shares, self.branches[0].c.device)  # once: the layers' updates follow without waiting
        moving = self.branches if move else []
        followed = [self._followed(b, step, on_device if b.guide is None else shares) for b in moving]
        self.spread = spread
        for branch, (way, moments) in zip(moving, followed, strict=True):
            branch.c.sub_(way, alpha=learning_rate * branch.scale)
            branch.moments = moments
            branch.steps_in_window += 1

    def _followed(self, branch: Branch, step: int, shares: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The direction (out_features, rank) by the estimate of dL/dC from the step's noise, drawn again; moments."""
        noise = branch.noise(self.config.noise, shares.shape[0], seed=self.config.seed, step=step, first_example=0)
        return direction(
            gradient_estimate(noise, shares),
            branch.moments,
            optimizer=self.config.optimizer,
            step_in_window=branch.steps_in_window,
            momentum=self.config.momentum,
            beta2=self.config.adam_beta2,
        )

    def _clipped(self, projected: Tensor) -> Tensor:
        """The projected gradients, cut at a multiple of their spread so far: no wild row raises its own limit."""
        return clipped(projected, limit=self.config.clip * self.spread.root_mean_square())

    def adapter(self) -> Mapping[str, LowRank]:
        """What was learned, layer by layer, at most `adapter_rank` wide."""
        return {branch.name: branch.result(self.config.adapter_rank) for branch in self.branches}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, as tensors by name; `restore` takes it back bit for bit."""
        tensors = self._present() | {
            "rate_factor": torch.tensor([self.rate_factor], dtype=torch.float64),
            "best_step": torch.tensor([self.best_step]),
            "watched": torch.tensor(self.watched, dtype=torch.float64),
        }
        return tensors | {f"{_BEST}{name}": tensor for name, tensor in self._best.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a `state`. Raises KeyError or ValueError when it is that of other layers."""
        best = {name.removeprefix(_BEST): tensor for name, tensor in tensors.items() if name.startswith(_BEST)}
        if best:
            self._restore_present(best)  # first: what does not fit the layers is refused now, not when it is needed
        self._restore_present(tensors)
        (self.rate_factor,), (self.best_step,) = tensors["rate_factor"].tolist(), tensors["best_step"].tolist()
        self.watched = tuple(tensors["watched"].tolist())
        self._best = best

    def _present(self) -> dict[str, Tensor]:
        """What has been learned and the update rule's memory, as tensors by name."""
        tensors = {
            "spread": torch.tensor([self.spread.total, float(self.spread.steps)], dtype=torch.float64),
            "scales": torch.tensor([b.scale for b in self.branches], dtype=torch.float64),
            "steps_in_window": torch.tensor([b.steps_in_window for b in self.branches]),
        }
        for branch in self.branches:
            tensors[f"basis.{branch.group.index}"] = branch.group.basis
            tensors |= {f"{name}.{branch.index}": tensor for name, tensor in _tensors_of(branch).items()}
        return tensors

    def _restore_present(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `_present` gave. Raises KeyError or ValueError when it is that of other layers."""
        total, steps = tensors["spread"].tolist()
        self.spread = Spread(total=total, steps=int(steps))
        scales, steps_in_window = tensors["scales"].tolist(), tensors["steps_in_window"].tolist()
        for branch, scale, steps in zip(self.branches, scales, steps_in_window, strict=True):
            device = branch.c.device
            branch.scale, branch.steps_in_window = scale, int(steps)
            branch.group.basis = tensors[f"basis.{branch.group.index}"].to(device)
            names = ("folded_c", "folded_a", "c")
            here = {name: tensors[f"{name}.{branch.index}"].to(device, copy=True) for name in names}
            folded = LowRank(here["folded_c"], here["folded_a"])
            if folded.shape != branch.shape or here["c"].shape != branch.c.shape:
                raise ValueError(f"{branch.name} has other shapes")
            branch.folded, branch.c = folded, here["c"]
            if branch.guide is not None:
                guide = tensors[f"guide.{branch.index}"].to(device)
                if guide.shape != branch.guide.shape:
                    raise ValueError(f"{branch.name} has another guide")
                branch.guide = guide
            n_moments = N_MOMENTS[self.config.optimizer]
            moments = [f"moment_{i}.{branch.index}" for i in range(n_moments)]
            branch.moments = [tensors[name].to(device, copy=True) for name in moments if name in tensors]


def _tensors_of(branch: Branch) -> dict[str, Tensor]:
    """A branch's learned tensors by name; copies of those that a step changes in place."""
    tensors = {"folded_c": branch.folded.c, "folded_a": branch.folded.a, "c": branch.c.clone()}
    if branch.guide is not None:
        tensors["guide"] = branch.guide
    return tensors | {f"moment_{i}": moment.clone() for i, moment in enumerate(branch.moments)}
