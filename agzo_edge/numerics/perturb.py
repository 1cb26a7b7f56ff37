"""The window's part of a branch, learned and perturbed, in one pass over the output: (C ± s mu R_b) (Aᵀ x).

Both ways to compute it give the same numbers up to rounding: torch's batched products, which run anywhere,
and a Triton kernel (`kernels.py`) that reads the signs as bits, or D with a number for each example.
"""

import torch
from torch import Tensor

from agzo_edge.numerics.compiled import kernels_for
from agzo_edge.numerics.noise import Noise
from agzo_edge.numerics.products import add_linear, in_blocks, linear


def perturbed_product(
    coordinates: Tensor,  # (streams * rows, tokens, rank): Aᵀ x
    noise: Noise,
    *,
    example: Tensor,  # (rows,) int64: the slice of the noise that a row of one stream takes
    factors: tuple[float, ...],  # s mu of each stream
    coefficients: Tensor | None = None,  # (out_features, rank) float32: C; None is zero
    onto: Tensor | None = None,  # (streams * rows, tokens, out_features): added to, in place
) -> Tensor:  # (streams * rows, tokens, out_features)
    """(C + factor R_b) Aᵀ x of every token, each row with its example's noise and its stream's factor.

    Source: AGZO, arXiv 2601.17261, the perturbation mu R Aᵀ, here on the layer's output.
    """
    kernels = kernels_for(noise.stored, rank=coordinates.shape[-1])
    if kernels is not None and (noise.is_packed or noise.guide is not None):
        product: Tensor = kernels.perturbed_product(
            coordinates, noise, example=example, factors=factors, coefficients=coefficients, onto=onto
        )
        return product
    if noise.guide is not None:
        of_rows = noise.entries().flatten()[example]
        along = coordinates * torch.cat([of_rows * factor for factor in factors]).view(-1, 1, 1)
        return _guided_product(along, noise.guide, coordinates=coordinates, coefficients=coefficients, onto=onto)
    product_in = _joined_product if coordinates.dtype is torch.float32 else _separate_product
    of_rows = noise.dense(coordinates.dtype)[example]  # (rows, out_features, rank)
    return product_in(coordinates, of_rows, factors=factors, coefficients=coefficients, onto=onto)


def _guided_product(
    along: Tensor,  # (streams * rows, tokens, rank): factor e_b Aᵀ x
    guide: Tensor,  # D (out_features, rank) float32
    *,
    coordinates: Tensor,
    coefficients: Tensor | None,
    onto: Tensor | None,
) -> Tensor:  # (streams * rows, tokens, out_features)
    """D along + C Aᵀ x: one product with (D, C), so the output is written once, and nothing per example is wide."""
    along, weights = along.to(coordinates.dtype), guide
    if coefficients is not None:
        along, weights = torch.cat([along, coordinates], dim=-1), torch.cat([guide, coefficients], dim=1)
    weights = weights.to(along.dtype)
    return linear(along, weights) if onto is None else add_linear(onto, along, weights)


def _joined_product(
    coordinates: Tensor, noise: Tensor, *, factors: tuple[float, ...], coefficients: Tensor | None, onto: Tensor | None
) -> Tensor:
    """One product with C + factor R_b: a pass less over the output (measured: docs/decisions/0040)."""
    if coefficients is None:
        weights = torch.cat([noise * factor for factor in factors])
    else:
        weights = torch.cat([torch.add(coefficients, noise, alpha=factor) for factor in factors])
    return torch.bmm(coordinates, weights.mT) if onto is None else onto.baddbmm_(coordinates, weights.mT)


def _separate_product(
    coordinates: Tensor, noise: Tensor, *, factors: tuple[float, ...], coefficients: Tensor | None, onto: Tensor | None
) -> Tensor:
    """The same in 16 bit, where C + factor R_b would round away the noise's digits: its signs alone are exact."""
    # zeros, to add to: a product that is written with beta = 0 is left out where alpha is 0 (torch 2.13, 16 bit, CPU)
    result = coordinates.new_zeros(*coordinates.shape[:-1], noise.shape[1]) if onto is None else onto
    streams = len(factors)
    for part, p_part, factor in zip(result.chunk(streams), coordinates.chunk(streams), factors, strict=True):
        if in_blocks(coordinates):
            for row, p_row, noise_row in zip(part, p_part, noise, strict=True):
                add_linear(row, p_row, noise_row, factor=factor)
        else:
            part.baddbmm_(p_part, noise.mT, alpha=factor)
    return result if coefficients is None else add_linear(result, coordinates, coefficients.to(result.dtype))
