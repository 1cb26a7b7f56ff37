"""Products of tokens with a weight: torch's own, but on a CPU in 16 bit in blocks of few sizes.

There torch asks oneDNN, which makes machine code for each number of rows that it meets and never gives it back:
measured, half a MiB for each, 3 MiB a step where no two batches are equally long (docs/decisions/0034). A block's code
is made once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 128
TAIL_ROWS = 32  # what is left after the blocks is filled up with zeros to a multiple of it: 4 sizes in all
WIDTH = 16  # of low-rank factors that grow, a multiple of it


def in_blocks(x: Tensor) -> bool:
    """Whether products of these tokens are made in blocks."""
    return x.device.type == "cpu" and x.dtype.itemsize < 4


def linear(
    x: Tensor,  # (..., in_features)
    weight: Tensor,  # (out_features, in_features), of the same dtype
    bias: Tensor | None = None,  # (out_features,)
) -> Tensor:  # (..., out_features)
    """x Wᵀ + b; the weight needs no gradient."""
    if not in_blocks(x):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    product: Tensor = _Blocks.apply(flat, weight) if x.requires_grad else _product(flat, weight)
    if bias is not None:
        product = product + bias if x.requires_grad else product.add_(bias)
    return product.view(*x.shape[:-1], weight.shape[0])


def add_linear(
    onto: Tensor,  # (..., out_features), contiguous, added to in place
    x: Tensor,  # (..., in_features)
    weight: Tensor,  # (out_features, in_features), of the same dtype
    *,
    factor: float = 1.0,
) -> Tensor:  # (..., out_features): `onto`
    """`onto` + factor x Wᵀ; no gradient."""
    flat, flat_onto = x.reshape(-1, x.shape[-1]), onto.view(-1, onto.shape[-1])
    if not in_blocks(x):
        flat_onto.addmm_(flat, weight.mT, alpha=factor)
        return onto
    blocks, tail = _blocks(len(flat))
    for rows in blocks:
        flat_onto[rows].addmm_(flat[rows], weight.mT, alpha=factor)
    if tail.start < len(flat):
        flat_onto[tail].add_(_tail_product(flat[tail], weight), alpha=factor)
    return onto


def whole_widths(columns: Tensor) -> Tensor:
    """`columns` with zeros beside them where products go in blocks: a sum that grows by a few has few widths then."""
    return F.pad(columns, (0, -columns.shape[1] % WIDTH)) if in_blocks(columns) else columns


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of (rows, in_features), in blocks."""
    blocks, tail = _blocks(len(x))
    if not blocks:
        return _tail_product(x, weight)
    product = x.new_empty(len(x), len(weight))
    for rows in blocks:
        torch.mm(x[rows], weight.mT, out=product[rows])
    if tail.start < len(x):
        product[tail] = _tail_product(x[tail], weight)
    return product


def _blocks(n_rows: int) -> tuple[list[slice], slice]:
    """The rows of each whole block, and those that are left."""
    full = n_rows // BLOCK_ROWS * BLOCK_ROWS
    return [slice(start, start + BLOCK_ROWS) for start in range(0, full, BLOCK_ROWS)], slice(full, n_rows)


def _tail_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of fewer rows than a block."""
    missing = -len(x) % TAIL_ROWS
    return (F.pad(x, (0, 0, 0, missing)) @ weight.mT)[: len(x)]


class _Blocks(torch.autograd.Function):
    """`_product` with a way back that goes in blocks too."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x Wᵀ."""
        context.save_for_backward(weight)
        return _product(x, weight)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of x; the weight has none."""
        (weight,) = context.saved_tensors
        return _product(gradients[0], weight.mT), None
