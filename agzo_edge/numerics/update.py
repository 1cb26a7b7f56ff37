"""The update rules on a layer's coefficients C, and the course of the learning rate."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Optimizer = Literal["sgd", "momentum", "adam", "sign"]
ADAM_EPS = 1e-8


def scheduled_rate(
    step: int,  # counted from 0
    *,
    peak: float,
    schedule: str,
    warmup_steps: int,
    max_steps: int,
) -> float:
    """The learning rate at `step`: a linear warm-up, then constant, linear or cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak


def direction(
    gradient: Tensor,  # (out_features, rank)
    moments: Sequence[Tensor],  # N_MOMENTS tensors of the same shape
    *,
    optimizer: Optimizer,
    step_in_window: int,  # counted from 0; Adam's bias correction starts again with each basis
    momentum: float,
    beta2: float,
) -> tuple[Tensor, list[Tensor]]:  # (out_features, rank), and the next moments
    """What the step follows for this gradient, and the moments with the gradient taken in; nothing is changed.

    sgd: the gradient; momentum: its exponential sum (Polyak); adam: Kingma and Ba, arXiv 1412.6980;
    sign: its sign (signSGD, arXiv 1802.04434).
    """
    if optimizer == "sign":
        return gradient.sign(), []
    if optimizer == "momentum":
        total = (moments[0] * momentum).add_(gradient)
        return total, [total]
    if optimizer == "adam":
        first = moments[0].lerp(gradient, 1.0 - momentum)
        second = moments[1].lerp(gradient.square(), 1.0 - beta2)
        steps = step_in_window + 1
        followed = (first / (1.0 - momentum**steps)) / ((second / (1.0 - beta2**steps)).sqrt() + ADAM_EPS)
        return followed, [first, second]
    return gradient, []


def reprojected(
    moment: Tensor,  # (out_features, rank) in coordinates of the old basis
    old_basis: Tensor,  # (in_features, rank)
    new_basis: Tensor,  # (in_features, rank)
) -> Tensor:  # (out_features, rank)
    """The moment M Aᵀ seen from the new basis: M (Aᵀ A'); what lies outside it is dropped."""
    return moment @ (old_basis.mT @ new_basis)


def stochastically_rounded(
    values: Tensor,  # float32
    *,
    random_bits: Tensor,  # int32 of the same shape, uniform in [0, 2**16)
) -> Tensor:  # bfloat16
    """`values` in bfloat16, rounded up or down with the probability that keeps the mean.

    An update smaller than half a unit in the last place survives on average instead of never.
    Source: Gupta et al., arXiv 1502.02551.
    """
    as_integers = values.contiguous().view(torch.int32) + random_bits
    return (as_integers & -65536).view(torch.float32).to(torch.bfloat16)
