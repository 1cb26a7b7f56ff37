"""Sums of low-rank weight changes, kept at a bounded rank."""

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """A weight change C Aᵀ by its factors."""

    c: Tensor  # (out_features, rank) float32
    a: Tensor  # (in_features, rank) float32

    @property
    def rank(self) -> int:
        """The number of columns."""
        return self.c.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the change."""
        return self.c.shape[0], self.a.shape[0]

    def dense(self) -> Tensor:  # (out_features, in_features)
        """The weight change itself."""
        return self.c @ self.a.mT

    def plus(self, other: "LowRank") -> "LowRank":
        """The exact sum, of the two ranks' sum."""
        return LowRank(torch.cat([self.c, other.c], dim=1), torch.cat([self.a, other.a], dim=1))


def zero_lowrank(out_features: int, in_features: int, *, device: torch.device | str = "cpu") -> LowRank:
    """The weight change nothing, of rank 0."""
    return LowRank(torch.zeros(out_features, 0, device=device), torch.zeros(in_features, 0, device=device))


def compressed(pair: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best approximation of at most `rank`, and the share of squared norm that it leaves out.

    QR of both factors, then the SVD of the small core (Eckart and Young); the singular values' square roots
    go to both sides, so that neither factor's entries grow. A pair that fits is returned as it is.
    """
    if pair.rank <= rank:
        return pair, 0.0
    q_c, r_c = torch.linalg.qr(pair.c)
    q_a, r_a = torch.linalg.qr(pair.a)
    u, sigma, vt = torch.linalg.svd(r_c @ r_a.mT, full_matrices=False)
    energy = sigma.double().square()
    root = sigma[:rank].sqrt()
    left_out = float(energy[rank:].sum() / energy.sum().clamp_min(torch.finfo(torch.float64).tiny))
    c, a = q_c @ (u[:, :rank] * root), q_a @ (vt[:rank].mT * root)
    return LowRank(c.contiguous(), a.contiguous()), left_out
