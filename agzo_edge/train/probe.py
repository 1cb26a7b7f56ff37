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

CANDIDATES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # fractions of a layer's output; half decades


@dataclass(frozen=True)
class MuProbe:
    """What the probes saw."""

    mu: float  # the chosen perturbation size
    noise_floor: float  # disagreement with its neighbours there, relative; 1 is no signal at all
    candidates: tuple[float, ...]
    disagreements: tuple[float, ...]  # of each candidate with its neighbours


def probe_mu(
    projected_at: Callable[[float], Tensor],  # mu -> (directions,) projected gradients, the same noise each time
    *,
    candidates: tuple[float, ...] = CANDIDATES,
) -> MuProbe:
    """The candidate whose projected gradients agree best with those of both its neighbours."""
    projected = [projected_at(mu).double() for mu in candidates]
    between = [_disagreement(a, b) for a, b in pairwise(projected)]
    around = [max(between[max(i - 1, 0) : i + 1]) for i in range(len(candidates))]
    best = min(range(1, len(candidates) - 1), key=lambda i: around[i])  # an end has one neighbour to ask
    return MuProbe(candidates[best], around[best], candidates, tuple(around))


def _disagreement(a: Tensor, b: Tensor) -> float:
    """The relative distance of two estimates of the same vector, 0 for equal and at most 1 (or no signal)."""
    size = float(torch.maximum(a.norm(), b.norm()))
    return float((a - b).norm()) / (2 * size) if 0 < size < math.inf else 1.0
