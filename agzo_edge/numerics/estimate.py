"""From losses to numbers a step can use: projected gradients, their spread, their clipping."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agzo_edge.numerics.compiled import kernels_for
from agzo_edge.numerics.noise import Noise


def projected_gradients(
    losses: Tensor,  # (2, examples) float32: rows of the positive and of the other sign
    *,
    mu: float,
    difference: str,
) -> Tensor:  # (examples,) float32
    """The directional derivative of each example's loss along its own noise.

    central: (l⁺ − l⁻) / 2mu; forward: (l⁺ − l⁰) / mu; exact: the second row is the derivative itself.
    Source: AGZO, arXiv 2601.17261, eq. of the projected gradient; MeZO, arXiv 2305.17333, Definition 1.
    """
    if difference == "exact":
        return losses[1]
    return (losses[0] - losses[1]) / (2 * mu if difference == "central" else mu)


def mean_square(projected: Tensor) -> float:
    """The mean of the squared projected gradients of one step, in float64."""
    return float(projected.double().square().mean())


def standard_errors_above(losses: Tensor, reference: Tensor) -> float:  # both (examples,)
    """By how many standard errors of their mean difference the same examples' losses lie above the reference's.

    Paired, so that what differs between examples drops out; 0 where all differ by nothing.
    """
    differences = (losses - reference).double()
    n_examples = differences.shape[0]
    mean = float(differences.mean())
    error = float(differences.std()) / math.sqrt(n_examples) if n_examples > 1 else 0.0
    if error > 0:
        return mean / error
    return math.copysign(math.inf, mean) if mean else 0.0


@dataclass(frozen=True)
class Spread:
    """A running root mean square of the projected gradients: the v of the normalised step.

    An exponential mean with Adam's bias correction. It follows from the journal's projected gradients
    alone, so replay rebuilds it exactly. Source: DESIGN section 2; GRZO, arXiv 2606.02857 and FZOO divide
    by the spread within one step, which is noisier for small batches.
    """

    DECAY: ClassVar = 0.95  # about twenty steps: long enough to smooth, short enough to follow the loss down
    total: float = 0.0
    steps: int = 0

    def root_mean_square(self) -> float:
        """The present spread; 0 before the first step."""
        if self.steps == 0:
            return 0.0
        return math.sqrt(self.total / (1.0 - self.DECAY**self.steps))

    def with_step(self, projected: Tensor) -> "Spread":
        """The spread after one more step with these projected gradients."""
        total = self.DECAY * self.total + (1.0 - self.DECAY) * mean_square(projected)
        return Spread(total, self.steps + 1)

    def normalized(self, projected: Tensor) -> Tensor:
        """The projected gradients in units of the spread; zero while there was none."""
        size = self.root_mean_square()
        return projected / size if size > 0 else torch.zeros_like(projected)


def clipped(projected: Tensor, *, limit: float) -> Tensor:
    """The projected gradients cut to [−limit, limit]; a limit of 0 or less cuts nothing."""
    return projected.clamp(-limit, limit) if limit > 0 else projected


def gradient_estimate(
    noise: Noise,
    weighted: Tensor,  # (examples,): w_b g_b, where the noise's stored entries are
) -> Tensor:  # (out_features, rank) float32
    """The estimate of dL/dC, sum_b w_b g_b R_b. Source: AGZO with a direction for each example, DESIGN 2."""
    weighted = weighted.float()
    if noise.guide is not None:
        return (weighted @ noise.entries().flatten()) * noise.guide
    kernels = kernels_for(noise.stored, rank=noise.shape[2])
    if kernels is not None and noise.is_packed:
        return kernels.weighted_signs(noise.stored, weighted, shape=noise.shape[1:])
    return (weighted @ noise.dense().flatten(1)).view(noise.shape[1:])
