"""The linear layer of the runtime: a frozen weight, read once, and a side-branch beside it."""

from collections.abc import Callable, Iterator

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from agzo_edge.model.branch import Branch
from agzo_edge.model.four_bit import FourBitWeight
from agzo_edge.model.passes import PassContext, Perturbation, Refresh
from agzo_edge.model.weights import BaseWeight
from agzo_edge.numerics.basis import projected
from agzo_edge.numerics.perturb import perturbed_product
from agzo_edge.numerics.products import add_linear, linear


class FrozenLinear(nn.Module):
    """y = W x + b with W dequantized for the one matmul; never a gradient, never a write."""

    bias: Tensor | None

    def __init__(self, weight: BaseWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.base = weight
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features); of dual tensors a product for each part.

        torch's own rule copies the weight, the head's with every chunk; parts of one product would be copied too.
        """
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is None:
            return self.product(primal, self.bias)
        weight = self.base.dense()
        return forward_ad.make_dual(linear(primal, weight, self.bias), linear(tangent, weight))

    def product(self, x: Tensor, bias: Tensor | None, *, beside: Tensor | None = None) -> Tensor:
        """W x + b + `beside`, which is used up, of plain tensors.

        The small terms come first and the matmul adds W x to them: one pass less over y than the other way
        round (measured: 5 % of a layer), and in 16 bit one rounding at the size of y instead of three.
        """
        if beside is not None and bias is not None:
            beside, bias = beside.add_(bias), None
        fused = self.base.fused_product(x, bias) if isinstance(self.base, FourBitWeight) else None
        if fused is not None:
            return fused if beside is None else beside.add_(fused)
        return linear(x, self.base.dense(), bias) if beside is None else add_linear(beside, x, self.base.dense())

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
        if context.perturbation is None or context.refresh is not Refresh.NONE:
            y = self._learned(rows, branch, self.bias)
            context.see_output(branch, rows, y)
            if context.perturbation is not None:  # only now: the noise takes a scale that the output is needed for
                self._perturbed(rows, branch, context.perturbation, onto=y)
        else:
            y = self.product(rows, self.bias, beside=self._beside(rows, branch, context.perturbation))
        return y.view(*x.shape[:-1], self.out_features)

    def _as_rows(self, x: Tensor) -> Tensor:
        """`x` as (rows, tokens, in_features): OPT flattens rows and tokens before its MLP."""
        if x.ndim == 2 and self.context.mask is not None:
            return x.view(self.context.n_streams * self.context.mask.shape[0], -1, x.shape[1])
        return x

    def _learned(
        self,
        x: Tensor,  # (..., in_features)
        branch: Branch,
        bias: Tensor | None,
    ) -> Tensor:  # (..., out_features)
        """W x + b + C_acc (A_accᵀ x) + C (Aᵀ x)."""
        return self.product(x, bias, beside=self._beside(x, branch, None))

    def _beside(self, x: Tensor, branch: Branch, perturbation: Perturbation | None) -> Tensor | None:
        """All that the branch adds to W x + b, (..., out_features); None for nothing."""
        folded, window = (None, None) if self.context.base_only else (branch.folded_in(x.dtype), branch.window)
        beside = None if folded is None else linear(projected(x, folded.a), folded.c)
        if perturbation is not None:
            return self._perturbed(x, branch, perturbation, coefficients=window, onto=beside)
        if window is None:
            return beside
        coordinates, c = self.context.coordinates(branch.group, x), window.to(x.dtype)
        return linear(coordinates, c) if beside is None else add_linear(beside, coordinates, c)

    def _perturbed(
        self,
        x: Tensor,  # (streams * rows, tokens, in_features)
        branch: Branch,
        perturbation: Perturbation,
        *,
        coefficients: Tensor | None = None,  # (out_features, rank)
        onto: Tensor | None = None,  # (streams * rows, tokens, out_features), added to in place
    ) -> Tensor:  # (streams * rows, tokens, out_features)
        """(C + step · scale · R_b) (Aᵀ x): each row with its example's noise, each stream with its own step."""
        coordinates, scale = self.context.coordinates(branch.group, x), self.context.scale_of(branch)
        factors = perturbation.steps
        if isinstance(scale, Tensor):
            coordinates = coordinates * scale
        else:
            factors = tuple(step * scale for step in factors)
        return perturbed_product(
            coordinates,
            perturbation.noise_of(branch),
            example=perturbation.example,
            factors=factors,
            coefficients=coefficients,
            onto=onto,
        )

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
        y_tangent = y_tangent + self._perturbed(rows, branch, perturbation)
        shape = (*primal.shape[:-1], self.out_features)
        dual: Tensor = forward_ad.make_dual(y.reshape(shape), y_tangent.reshape(shape))
        return dual
