"""Triton kernels that take the noise as bits: neither R nor its product with anything is ever written to memory.

Importing this module needs Triton; `perturb.kernels_for` does so where it is there and the tensors are on a GPU. With
TRITON_INTERPRET=1 set before the import the same code runs on a CPU, which is how it is tested without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from agzo_edge.numerics.noise import Noise

BLOCK_TOKENS, BLOCK_FEATURES = 32, 128  # 32 float32 sums for each of a program's 128 threads
BLOCK_ENTRIES = 1024


@triton.jit
def _signs(bits, entry, inside):
    """The signs -1 and +1 of `entry`, numbered as in `noise.unpack_signs`."""
    byte = tl.load(bits + (entry >> 3), mask=inside, other=0).to(tl.int32)
    return (((byte >> (entry & 7)) & 1) * 2 - 1).to(tl.float32)


@triton.jit
def _perturbed_product(
    y,
    coordinates,
    bits,
    example,
    coefficients,
    factor_0,
    factor_1,
    rows,
    tokens,
    out_features,
    row_bytes,
    row_stride,
    token_stride,
    rank_stride,
    RANK: tl.constexpr,
    LEARNED: tl.constexpr,
    ONTO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y[n, t, o] = (y[n, t, o] +) sum_k coordinates[n, t, k] (C[o, k] + factor R_b[o, k]), summed in float32."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(2)
    of_features, of_tokens = o < out_features, t < tokens
    factor = tl.where(n < rows, factor_0, factor_1)
    row_bits = bits + tl.load(example + n % rows) * row_bytes
    row_coordinates = coordinates + n.to(tl.int64) * row_stride + t * token_stride
    total = tl.full((BLOCK_T, BLOCK_O), 0.0, tl.float32)
    for k in tl.static_range(RANK):
        entry = o * RANK + k
        weight = factor * _signs(row_bits, entry, of_features)
        if LEARNED:
            weight += tl.load(coefficients + entry, mask=of_features, other=0.0)
        p = tl.load(row_coordinates + k * rank_stride, mask=of_tokens, other=0.0).to(tl.float32)
        total += p[:, None] * weight[None, :]
    place = y + (n.to(tl.int64) * tokens + t)[:, None] * out_features + o[None, :]
    inside = of_tokens[:, None] & of_features[None, :]
    if ONTO:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_signs(total, bits, weighted, examples, entries, row_bytes, BLOCK: tl.constexpr):
    """total[e] = sum_b weighted[b] R_b[e], in the order of the examples."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    sums = tl.full((BLOCK,), 0.0, tl.float32)
    for b in range(examples):
        sums += tl.load(weighted + b) * _signs(bits + b * row_bytes, entry, inside)
    tl.store(total + entry, sums, mask=inside)


def perturbed_product(
    coordinates: Tensor,  # (streams * rows, tokens, rank), of any strides
    noise: Noise,  # packed
    *,
    example: Tensor,  # (rows,) int64
    factors: tuple[float, ...],
    coefficients: Tensor | None,  # (out_features, rank) float32
    onto: Tensor | None,  # (streams * rows, tokens, out_features), contiguous
) -> Tensor:  # (streams * rows, tokens, out_features)
    """`perturb.perturbed_product`, in one kernel that reads x A, bits and C and writes y once."""
    n_rows, tokens, rank = coordinates.shape
    out_features = noise.shape[1]
    y = coordinates.new_empty(n_rows, tokens, out_features) if onto is None else onto
    assert y.is_contiguous()
    grid = (triton.cdiv(out_features, BLOCK_FEATURES), triton.cdiv(tokens, BLOCK_TOKENS), n_rows)
    _perturbed_product[grid](
        y,
        coordinates,
        noise.stored,
        example,
        y if coefficients is None else coefficients.contiguous(),
        factors[0],
        factors[-1],
        n_rows // len(factors),
        tokens,
        out_features,
        noise.stored.stride(0),
        *coordinates.stride(),
        RANK=rank,
        LEARNED=coefficients is not None,
        ONTO=onto is not None,
        BLOCK_T=BLOCK_TOKENS,
        BLOCK_O=BLOCK_FEATURES,
    )
    return y


def weighted_signs(
    bits: Tensor,  # (examples, bytes) uint8
    weighted: Tensor,  # (examples,) float32
    *,
    shape: tuple[int, int],  # (out_features, rank)
) -> Tensor:  # (out_features, rank) float32
    """sum_b weighted_b R_b from the bits of all examples."""
    total = torch.empty(shape, dtype=torch.float32, device=bits.device)
    grid = (triton.cdiv(total.numel(), BLOCK_ENTRIES),)
    _weighted_signs[grid](total, bits, weighted, len(weighted), total.numel(), bits.stride(0), BLOCK=BLOCK_ENTRIES)
    return total
