"""Finding the perturbation size: the plateau between rounding noise and curvature.

A finite difference is wrong in two ways: too small a perturbation drowns in the forward's rounding, too
large a one sees the loss bend. In between, neighbouring sizes agree about every projected gradient. A few
probes on the first batch find that place for this model, dtype and card.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from agzo_edge.errors import NonFiniteLossError

CANDIDATES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # fractions of a layer's output; half decades
# Where rounding is e times the signal, and sqrt(10) e at the next smaller size, the two disagree by
# sqrt(11) e / 2 sqrt(1 + 10 e²): .44 at e = .5, .50 at 1, never over .53. docs/decisions/0035 has it simulated.
LOST_SIGNAL = 0.45


@dataclass(frozen=True)
class MuProbe:
    """What the probes saw."""

    mu: float  # the chosen perturbation size
    noise_floor: float  # disagreement with its neighbours there, relative; 1 is no signal at all
    candidates: tuple[float, ...]
    disagreements: tuple[float, ...]  # of each candidate with its neighbours

    @property
    def is_lost(self) -> bool:
        """Whether rounding is half the signal or more at every size; meant for eight directions or more."""
        return self.noise_floor > LOST_SIGNAL


def probe_mu(
    projected_at: Callable[[float], Tensor],  # mu -> (directions,) projected gradients, the same noise each time
    *,
    candidates: tuple[float, ...] = CANDIDATES,
) -> MuProbe:
    """The candidate whose projected gradients agree best with those of both its neighbours.

    One at which a loss is not finite, as large ones can be in float16, agrees with none.
    """
    projected = [finite_or_nan(projected_at, mu).double() for mu in candidates]
    between = [_disagreement(a, b) for a, b in pairwise(projected)]
    around = [max(between[max(i - 1, 0) : i + 1]) for i in range(len(candidates))]
    best = min(range(1, len(candidates) - 1), key=lambda i: around[i])  # an end has one neighbour to ask
    return MuProbe(candidates[best], around[best], candidates, tuple(around))


def finite_or_nan(projected_at: Callable[[float], Tensor], mu: float) -> Tensor:
    """The projected gradients at `mu`, or a NaN where a loss is not finite."""
    try:
        return projected_at(mu)
    except NonFiniteLossError:
        return torch.tensor(math.nan)


def _disagreement(a: Tensor, b: Tensor) -> float:
    """The relative distance of two estimates of the same vector, 0 for equal and at most 1 (or no signal)."""
    size = float(torch.maximum(a.norm(), b.norm()))
    return float((a - b).norm()) / (2 * size) if 0 < size < math.inf else 1.0
