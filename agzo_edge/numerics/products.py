"""Products of tokens with a weight: torch's own, but on a CPU in 16 bit in blocks of few sizes.

There torch asks oneDNN, which makes machine code for each number of rows that it meets and never gives it back:
measured, half a MiB for each, 3 MiB a step where no two batches are equally long (docs/decisions/0034). A block's code
is made once, and all blocks are alike: what is left of the rows is filled up with zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 128
FEW_ROWS = 32  # so many or fewer, as while an answer is written, are one block of 32; up to 64 are one of 64
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
    size = _block_rows(len(flat))
    for some, some_onto in zip(flat.split(size), flat_onto.split(size), strict=True):
        if len(some) == size:
            some_onto.addmm_(some, weight.mT, alpha=factor)
        else:
            some_onto.add_(_filled_product(some, weight, size), alpha=factor)
    return onto


def whole_blocks(n_rows: int) -> int:
    """The most rows, of `n_rows` that may be multiplied at once, in whole blocks; all of them where they are one."""
    return n_rows - n_rows % BLOCK_ROWS if n_rows > BLOCK_ROWS else n_rows


def whole_widths(columns: Tensor) -> Tensor:
    """`columns` with zeros beside them where products go in blocks: a sum that grows by a few has few widths then."""
    return F.pad(columns, (0, -columns.shape[1] % WIDTH)) if in_blocks(columns) else columns


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of (rows, in_features), in blocks."""
    size = _block_rows(len(x))
    if len(x) < size:
        return _filled_product(x, weight, size)
    product = x.new_empty(len(x), len(weight))
    for some, its_product in zip(x.split(size), product.split(size), strict=True):
        if len(some) == size:
            torch.mm(some, weight.mT, out=its_product)
        else:
            its_product.copy_(_filled_product(some, weight, size))
    return product


def _block_rows(n_rows: int) -> int:
    """The rows of a block, of so many: the least power of two that holds them, within bounds."""
    return min(BLOCK_ROWS, max(FEW_ROWS, 1 << (n_rows - 1).bit_length()))


def _filled_product(x: Tensor, weight: Tensor, size: int) -> Tensor:
    """x Wᵀ of fewer rows than a block."""
    return (F.pad(x, (0, 0, 0, size - len(x))) @ weight.mT)[: len(x)]


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
