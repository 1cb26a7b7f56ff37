"""The basis of a layer: the leading directions of its inputs.

The gradient of a linear layer is Qᵀ H, H the inputs and Q something: its rows lie in the span of H's
rows. AGZO perturbs only inside the r leading directions of that span.
Source: AGZO, arXiv 2601.17261, Algorithm 1 (the basis A_l, by K steps of power iteration).
"""

import torch
from torch import Tensor

from agzo_edge.numerics.compiled import kernels_for
from agzo_edge.numerics.products import in_blocks, linear

# A new direction is taken only where the inputs hold more than this share of the largest one's size there. Columns of
# Hᵀ (H A) are as its square, about float32's eps, below which they have seen nothing but rounding.
NEGLIGIBLE = 3e-4
# What is left of a column beyond those before it, below which it is their rounding: with fewer tokens than
# columns, or one outlying token, all columns of the product are parallel. Nearly parallel ones before it make it a
# thousand times larger than float32's own (measured: at 1e-5 it took a place in 37 of 9,000 draws, at 1e-4 in none).
ROUNDING = 1e-4


def starting_basis(in_features: int, rank: int) -> Tensor:
    """A fixed orthonormal start (in_features, rank), float32: cosines of the lowest frequencies.

    Dense in every coordinate, so no input direction is missed by chance, and equal on every machine up to
    rounding, with no generator to seed.
    """
    place = (torch.arange(in_features, dtype=torch.float64) + 0.5) / in_features
    frequency = torch.arange(rank, dtype=torch.float64) * 2.7 + 1.3  # off the grid: no constant column
    return orthonormal(torch.cos(torch.pi * place[:, None] * frequency).float())


def orthonormal(columns: Tensor) -> Tensor:  # (features, rank) -> (features, rank) float32
    """Orthonormal columns with the span of `columns`.

    Columns are scaled to unit length first, so that the QR does not lose the small ones, and the signs are
    fixed (a positive diagonal of R), so that a warm-started basis does not flip between windows. The result
    is laid out row by row: a matmul rounds by layout, and a basis read back from a file must give the same.
    """
    columns = columns.float()
    lengths = columns.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    q, r = torch.linalg.qr(columns / lengths)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()


def projected(
    inputs: Tensor,  # (..., in_features)
    basis: Tensor,  # (in_features, rank), of the same dtype
) -> Tensor:  # (..., rank)
    """H A, on a CPU as (Aᵀ Hᵀ)ᵀ: with a few columns on the right its BLAS takes five times as long (measured)."""
    if inputs.is_cuda:
        return inputs @ basis
    if in_blocks(inputs):
        return linear(inputs, basis.mT)
    flat = basis.mT.contiguous() @ inputs.reshape(-1, inputs.shape[-1]).mT
    return flat.mT.unflatten(0, inputs.shape[:-1])


def subspace_product(
    inputs: Tensor,  # (tokens, in_features)
    basis: Tensor,  # (in_features, rank) float32
) -> Tensor:  # (in_features, rank) float32
    """One application Hᵀ (H A): the step of the subspace iteration, additive over groups of tokens."""
    inputs = inputs.float()
    return (projected(inputs, basis).mT @ inputs).mT


def next_basis(product: Tensor, previous: Tensor) -> Tensor:
    """The orthonormal basis after one step; directions in which the inputs are silent keep their old ones.

    Without that, fewer tokens than `rank` would fill the basis with normalised rounding noise. A product that
    is not finite keeps the whole basis: the loss, which names the rows, is left to tell.
    """
    if (kernels := kernels_for(product, rank=product.shape[1])) is not None:
        basis: Tensor = kernels.next_basis(product, previous)
        return basis
    product = torch.where(product.isfinite().all(), product, 0.0)
    lengths = product.norm(dim=0)
    columns = torch.where(lengths <= NEGLIGIBLE**2 * lengths.max(), previous, product)
    beyond = torch.linalg.qr(columns / columns.norm(dim=0), mode="r").R.diagonal().abs()
    return orthonormal(torch.where(beyond < ROUNDING, previous, columns))


def activation_basis(
    inputs: Tensor,  # (tokens, in_features)
    start: Tensor,  # (in_features, rank) float32, orthonormal: the previous window's basis
    *,
    n_iter: int = 3,
) -> Tensor:  # (in_features, rank) float32, orthonormal columns
    """The leading input directions of one layer, by `n_iter` steps of subspace iteration from `start`.

    Source: AGZO, arXiv 2601.17261, Algorithm 1; K = 3 there.
    """
    basis, inputs = start, inputs.float()
    for _ in range(n_iter):
        basis = next_basis(subspace_product(inputs, basis), basis)
    return basis
