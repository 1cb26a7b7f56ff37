"""The linear layer of the runtime: a frozen weight, read once, and a side-branch beside it."""

from collections.abc import Callable, Iterator

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from agzo_edge.model.branch import Branch
from agzo_edge.model.passes import PassContext, Perturbation, Refresh
from agzo_edge.model.weights import BaseWeight
from agzo_edge.numerics.basis import projected


class FrozenLinear(nn.Module):
    """y = W x + b with W dequantized for the one matmul; never a gradient, never a write."""

    bias: Tensor | None

    def __init__(self, weight: BaseWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.base = weight
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.base.dense(), self.bias)

    def parts(self) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
        """The layer in parts of its outputs, for a head whose outputs do not all fit: here it is one."""
        yield slice(0, self.out_features), self


class BranchedLinear(FrozenLinear):
    """A frozen layer with a side-branch: learned coefficients, and the pass's perturbation.

    Source: AGZO, arXiv 2601.17261: the perturbation mu R Aᵀ, here never added to the weight.
    """

    def __init__(self, weight: BaseWeight, bias: Tensor | None, *, context: PassContext) -> None:
        super().__init__(weight, bias)
        self.context = context
        self.branch: Branch | None = None  # attached once the input groups are known

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, in_features) -> (rows, tokens, out_features); dual tensors in exact mode."""
        branch, context = self.branch, self.context
        if branch is None:
            return super().forward(x)
        if context.perturbation is not None and context.perturbation.exact:
            return self._dual_forward(x, branch, context.perturbation)
        rows = self._as_rows(x)
        context.see_input(branch.group, rows)
        if context.perturbation is None:
            y = self._learned(rows, branch, self.bias)
            context.see_output(branch, rows, y)
        elif context.refresh is Refresh.NONE:
            y = self._learned(rows, branch, self.bias, beside=_perturbation_of(rows, branch, context.perturbation))
        else:  # the noise takes a scale that the output is needed for
            y = self._learned(rows, branch, self.bias)
            context.see_output(branch, rows, y)
            y += _perturbation_of(rows, branch, context.perturbation)
        return y.view(*x.shape[:-1], self.out_features)

    def _as_rows(self, x: Tensor) -> Tensor:
        """`x` as (rows, tokens, in_features): OPT flattens rows and tokens before its MLP."""
        if x.ndim == 2 and self.context.mask is not None:
            return x.view(-1, self.context.mask.shape[1], x.shape[1])
        return x

    def _learned(
        self,
        x: Tensor,  # (..., in_features)
        branch: Branch,
        bias: Tensor | None,
        *,
        beside: Tensor | None = None,  # (..., out_features), used up
    ) -> Tensor:  # (..., out_features)
        """W x + b + C Aᵀ x + `beside`, C Aᵀ all that was learned.

        The small terms come first and the matmul adds W x to them: one pass less over y than the other way
        round (measured: 5 % of a layer), and in 16 bit one rounding at the size of y instead of three.
        """
        change = None if self.context.base_only else branch.factors(x.dtype)
        if change is not None:
            learned = projected(x, change.a).flatten(0, -2)
            if beside is None:
                beside = (learned @ change.c.mT).view(*x.shape[:-1], self.out_features)
            else:
                beside.view(-1, self.out_features).addmm_(learned, change.c.mT)
        if beside is None:
            return F.linear(x, self.base.dense(), bias)
        if bias is not None:
            beside += bias
        beside.view(-1, self.out_features).addmm_(x.reshape(-1, self.in_features), self.base.dense().mT)
        return beside

    def _dual_forward(self, x: Tensor, branch: Branch, perturbation: Perturbation) -> Tensor:
        """The layer on (x, t): (W x + b, W t + s R Aᵀ x), one matmul over both streams."""
        primal, tangent = forward_ad.unpack_dual(x)
        rows = self._as_rows(primal)
        self.context.see_input(branch.group, rows)
        if tangent is None:  # the first layer: nothing below it was perturbed
            y = self._learned(rows, branch, None)
            y_tangent = torch.zeros_like(y)
        else:
            both = torch.cat([rows, self._as_rows(tangent)])
            y, y_tangent = self._learned(both, branch, None).chunk(2)
        if self.bias is not None:
            y = y + self.bias
        self.context.see_output(branch, rows, y)
        y_tangent = y_tangent + _perturbation_of(rows, branch, perturbation)
        shape = (*primal.shape[:-1], self.out_features)
        dual: Tensor = forward_ad.make_dual(y.reshape(shape), y_tangent.reshape(shape))
        return dual


def _perturbation_of(
    x: Tensor,  # (streams * rows, tokens, in_features)
    branch: Branch,
    perturbation: Perturbation,
) -> Tensor:  # (streams * rows, tokens, out_features)
    """step · scale · R_b (Aᵀ x): each row with its example's noise, each stream with its own step."""
    noise = perturbation.noise_of(branch)[perturbation.example]  # (rows, out_features, rank)
    coordinates = projected(x, branch.group.basis.to(x.dtype))  # (streams * rows, tokens, rank)
    result = x.new_empty(*x.shape[:-1], branch.out_features)
    streams = len(perturbation.steps)
    for part, p_part, step in zip(result.chunk(streams), coordinates.chunk(streams), perturbation.steps, strict=True):
        part.baddbmm_(p_part, noise.mT, beta=0, alpha=step * branch.scale)
    return result
