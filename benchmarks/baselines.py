"""MeZO, written from its paper, for the benchmarks to compare with."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class Mezo:
    """Memory-efficient zeroth-order SGD on dense weights, changed in place.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333,
    Algorithm 1. The direction z is never held: it is drawn again from its seed each time it is needed.
    """

    def __init__(self, weights: Sequence[Tensor], loss: Callable[[], float], *, eps: float = 1e-3) -> None:
        self.weights = weights
        self.loss = loss
        self.eps = eps

    def step(self, seed: int, *, learning_rate: float) -> float:
        """One step; the projected gradient (l⁺ − l⁻) / 2 eps."""
        projected = self.projected_gradient(seed)
        self._add(seed, -learning_rate * projected)
        return projected

    def projected_gradient(self, seed: int) -> float:
        """The two forwards of a step; the weights are back where they were, up to rounding."""
        self._add(seed, self.eps)
        positive = self.loss()
        self._add(seed, -2 * self.eps)
        negative = self.loss()
        self._add(seed, self.eps)
        return (positive - negative) / (2 * self.eps)

    def directions(self, seed: int) -> Iterator[Tensor]:
        """z for each weight, standard normal."""
        generator = torch.Generator(device=self.weights[0].device).manual_seed(seed)
        for weight in self.weights:
            yield torch.empty_like(weight, memory_format=torch.contiguous_format).normal_(generator=generator)

    def _add(self, seed: int, factor: float) -> None:
        for weight, z in zip(self.weights, self.directions(seed), strict=True):
            weight.add_(z, alpha=factor)
