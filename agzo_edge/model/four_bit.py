"""A bitsandbytes NF4 or FP4 weight, dequantized into a buffer that is there already."""

import ctypes
from collections.abc import Iterator
from copy import copy
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from agzo_edge.model.workspace import Workspace

FEW_ROWS = 4  # so many or fewer, as while an answer is written, bitsandbytes 0.50 multiplies in one kernel on any card
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # in the library's symbols


class FourBitWeight:
    """A bitsandbytes NF4 or FP4 weight: packed nibbles and a float32 scale for each block of 64."""

    def __init__(self, packed: Tensor, state: Any, *, dtype: torch.dtype, workspace: Workspace) -> None:
        self.packed = packed
        self.state = state
        self.state.dtype = dtype  # what dequantize_4bit returns; a pre-quantized file may say otherwise
        self.shape = (state.shape[0], state.shape[1])
        self.workspace = workspace
        workspace.expect(self.shape, dtype)

    @property
    def kind(self) -> str:
        """How it is stored."""
        return str(self.state.quant_type)

    def dense(self) -> Tensor:
        """The dequantized weight, in the workspace."""
        from bitsandbytes.functional import dequantize_4bit

        weight = self.workspace.tensor(self.shape, dtype=self.state.dtype, device=self.packed.device)
        if self.packed.is_cuda:
            dequantize_4bit(self.packed, self.state, out=weight)
        else:
            _dequantize_on_cpu(self.packed, self.state, weight)
        return weight

    def fused_product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x Wᵀ + b (..., out_features) by a kernel that reads the nibbles alone; None where there are too many rows.

        A weight that is dequantized for one token is written and read again as a whole, nine times the bytes. Of more
        rows the library may dequantize it as well, and into memory of its own.
        """
        state = self.state
        is_few = x.numel() <= FEW_ROWS * x.shape[-1] and x.dtype is state.dtype and not x.requires_grad
        if not (is_few and self.packed.is_cuda and self.shape[1] % state.blocksize == 0):
            return None
        works = _fuses_rightly(x.device, x.dtype, quant_type=state.quant_type, is_nested=state.nested)
        return _fused(x, self, bias) if works else None

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The packed nibbles and their scales, the nested ones too."""
        yield "packed", self.packed
        yield "absmax", self.state.absmax
        if self.state.nested:
            yield "nested_absmax", self.state.state2.absmax
            yield "offset", self.state.offset

    def movable(self) -> tuple[Tensor, ...]:
        """Nibbles and scales; the few numbers of code books and nested scales stay."""
        return self.packed, self.state.absmax

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same weight elsewhere."""
        packed, absmax = tensors
        state = copy(self.state)
        state.absmax = absmax
        return type(self)(packed, state, dtype=state.dtype, workspace=self.workspace)


def _dequantize_on_cpu(packed: Tensor, state: Any, weight: Tensor) -> None:
    """Fill `weight` by bitsandbytes' CPU kernel, which its Python operator would hand a fresh buffer.

    Blocks run on through the rows of a weight, and the kernel (0.50.2) begins a new one with every row: a quarter of
    a weight whose width is no multiple of 64 would be scaled wrongly. So each block is handed over as a row of
    its own, and what is left over at the end as one more.
    """
    from bitsandbytes.cextension import lib

    fill = getattr(lib, f"cdequantize_blockwise_cpu_{state.quant_type}_{_DTYPE_NAMES[state.dtype]}")
    absmax, size = _plain_absmax(state), int(state.blocksize)
    whole, rest = divmod(weight.numel(), size)
    for rows, width, block in ((whole, size, 0), (1, rest, whole)):
        if rows and width:
            fill(
                ctypes.c_void_p(packed.data_ptr() + block * size // 2),
                ctypes.c_void_p(absmax.data_ptr() + block * absmax.itemsize),
                ctypes.c_void_p(weight.data_ptr() + block * size * weight.itemsize),
                *map(ctypes.c_longlong, (size, rows, width)),
            )


def _plain_absmax(state: Any) -> Tensor:  # (blocks,) float32
    """The scale of each block, its own quantization undone."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def _fused(x: Tensor, weight: FourBitWeight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b as bitsandbytes' own layer has it."""
    from bitsandbytes import matmul_4bit

    product: Tensor = matmul_4bit(x, weight.packed.t(), quant_state=weight.state, bias=bias)
    return product


@cache
def _fuses_rightly(device: torch.device, dtype: torch.dtype, *, quant_type: str, is_nested: bool) -> bool:
    """Whether the fused kernel is there and gives the dequantized product's numbers, tried once on a small case."""
    from bitsandbytes.functional import quantize_4bit

    drawn = torch.randn(128 + FEW_ROWS, 128, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x, values = drawn[:FEW_ROWS], drawn[FEW_ROWS:]
    values[:, 64:] *= 3.0  # the two blocks of a row have unlike scales
    packed, state = quantize_4bit(values, quant_type=quant_type, compress_statistics=is_nested)
    weight = FourBitWeight(packed, state, dtype=dtype, workspace=Workspace())
    try:
        found = _fused(x, weight, x[0])
    except Exception:  # noqa: BLE001  # whatever keeps it from working here, the product of the dense weight does
        return False
    expected = x @ weight.dense().mT + x[0]
    return torch.allclose(found, expected, rtol=0.0, atol=0.01 * float(expected.abs().max()))
