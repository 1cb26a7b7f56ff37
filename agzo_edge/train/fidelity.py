"""How far a finite difference is from the exact derivative, over the size of the perturbation.

Too small a perturbation drowns in the forward's rounding, too large a one sees the loss bend. The probe of mu
compares sizes with each other; here each is compared with the derivative itself, along the same noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agzo_edge.config import RunConfig
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.train.data import ExampleSet
from agzo_edge.train.loop import bases_kept, batches_of_step
from agzo_edge.train.objective import Goal
from agzo_edge.train.probe import CANDIDATES, MuProbe, finite_or_nan, probe_mu
from agzo_edge.train.step import find_window, measure

SIZES = (*CANDIDATES, 0.0003, 0.0001)  # what mu auto chooses from, and the two half decades below
N_DRAWS = 4  # of the noise: with a batch of 16, 64 directions
LARGEST_ERROR = 0.5  # relative: the noise that it adds has a quarter of the signal's energy


@dataclass(frozen=True)
class Fidelity:
    """What was seen on one batch."""

    sizes: tuple[float, ...]
    errors: tuple[float, ...]  # relative to the exact derivatives; 1 is as large as they are, NaN a broken loss
    probe: MuProbe  # what a run with mu auto sees on this batch, and takes

    @property
    def error_of_auto(self) -> float:
        """The error at the size that mu auto takes."""
        return self.errors[self.sizes.index(self.probe.mu)]

    @property
    def best(self) -> float:
        """The size with the smallest error."""
        finite = {size: error for size, error in zip(self.sizes, self.errors, strict=True) if math.isfinite(error)}
        return min(finite, key=finite.__getitem__, default=self.probe.mu)

    @property
    def advice(self) -> str:
        """What to train with."""
        auto, error = self.probe.mu, self.error_of_auto
        if error <= LARGEST_ERROR:
            return f"--mu auto is right here: it takes {auto:g}, which is {error:.2g} of the signal off"
        least = self.errors[self.sizes.index(self.best)]
        if least <= LARGEST_ERROR:
            return f"use --mu {self.best:g}, which is {least:.2g} of the signal off; --mu auto would take {auto:g}"
        return "no size is faithful here: use --difference exact, which carries the derivative, or --dtype float32"


def fidelity(model: EdgeModel, data: ExampleSet, config: RunConfig, *, goal: Goal) -> Fidelity:
    """The errors of `config.difference` at every size, on the first batch of a run; the model is left as it was.

    The exact derivative is taken in the same dtype, whose rounding it feels too, though without the cancellation:
    in bfloat16 errors of a few hundredths cannot be told apart. Raises NonFiniteLossError where that is not finite.
    """
    batches = batches_of_step(model, data, step=0, config=config)

    def projected(mu: float, settings: RunConfig = config, *, draws: int = N_DRAWS) -> Tensor:
        seen = [measure(model, batches, step=step, mu=mu, config=settings, goal=goal)[0] for step in range(draws)]
        return torch.cat([each.projected for each in seen])

    with bases_kept(model):
        find_window(model, batches, config, goal=goal)
        exact = projected(1.0, config.model_copy(update={"difference": "exact"}))
        errors = [relative_error(finite_or_nan(projected, size), exact) for size in SIZES]
        return Fidelity(SIZES, tuple(errors), probe_mu(lambda mu: projected(mu, draws=1)))


def relative_error(
    estimate: Tensor,  # (directions,), or one NaN
    exact: Tensor,  # (directions,)
) -> float:
    """The distance of an estimate from the exact derivatives, by their size; NaN where there is none."""
    size = float(exact.double().norm())
    return float((estimate - exact).double().norm()) / size if size > 0 else math.nan
