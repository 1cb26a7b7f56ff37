"""Triton kernels for what is small and often: the branch's product, the update's sum, the next basis.

Noise is taken as bits, or as a guide and a number for each example: neither R nor its product with anything is ever
written to memory. A basis is one launch where torch's QR and its checks are fifty.

Importing this module needs Triton; `compiled.kernels_for` does so where it is there and the tensors are on a GPU. With
TRITON_INTERPRET=1 set before the import the same code runs on a CPU, which is how it is tested without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from agzo_edge.numerics import basis as torch_basis
from agzo_edge.numerics import estimate as torch_estimate
from agzo_edge.numerics import perturb as torch_perturb
from agzo_edge.numerics.basis import NEGLIGIBLE, ROUNDING, starting_basis
from agzo_edge.numerics.noise import Noise, draw_noise, guided_noise

BLOCK_TOKENS, BLOCK_FEATURES = 16, 128  # 16 float32 sums a thread: with 32 registers spill from rank 8 on (sm_90)
BLOCK_ENTRIES = 1024
# Lengths change from step to step, and Triton would compile anew for ones, for multiples of 16 and for others.
VARYING = ["rows", "tokens", "noise_stride", "row_stride", "token_stride", "rank_stride"]
ENTRIES_OF_THREAD = 16  # of a column of a basis, all of which one program holds


@triton.jit
def _signs(bits, entry, inside):
    """The signs -1 and +1 of `entry`, numbered as in `noise.unpack_signs`."""
    byte = tl.load(bits + (entry >> 3), mask=inside, other=0).to(tl.int32)
    return (((byte >> (entry & 7)) & 1) * 2 - 1).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def _perturbed_product(
    y,
    coordinates,
    noise,
    guide,
    example,
    coefficients,
    factor_0,
    factor_1,
    rows,
    tokens,
    out_features,
    noise_stride,
    row_stride,
    token_stride,
    rank_stride,
    RANK: tl.constexpr,
    GUIDED: tl.constexpr,
    LEARNED: tl.constexpr,
    ONTO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y[n, t, o] = (y[n, t, o] +) sum_k coordinates[n, t, k] (C[o, k] + factor R_b[o, k]), summed in float32.

    R_b is e_b D with a guide, of which `noise` holds e_b; else `noise` holds its bits.
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(2)
    of_features, of_tokens = o < out_features, t < tokens
    factor = tl.where(n < rows, factor_0, factor_1)
    b = tl.load(example + n % rows)
    if GUIDED:
        factor *= tl.load(noise + b * noise_stride)
    row_coordinates = coordinates + n.to(tl.int64) * row_stride + t * token_stride
    total = tl.full((BLOCK_T, BLOCK_O), 0.0, tl.float32)
    for k in tl.static_range(RANK):
        entry = o * RANK + k
        if GUIDED:
            weight = factor * tl.load(guide + entry, mask=of_features, other=0.0)
        else:
            weight = factor * _signs(noise + b * noise_stride, entry, of_features)
        if LEARNED:
            weight += tl.load(coefficients + entry, mask=of_features, other=0.0)
        p = tl.load(row_coordinates + k * rank_stride, mask=of_tokens, other=0.0).to(tl.float32)
        total += p[:, None] * weight[None, :]
    place = y + (n.to(tl.int64) * tokens + t)[:, None] * out_features + o[None, :]
    inside = of_tokens[:, None] & of_features[None, :]
    if ONTO:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["examples"])
def _weighted_signs(total, bits, weighted, examples, entries, row_bytes, BLOCK: tl.constexpr):
    """total[e] = sum_b weighted[b] R_b[e], in the order of the examples."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    sums = tl.full((BLOCK,), 0.0, tl.float32)
    for b in range(examples):
        sums += tl.load(weighted + b) * _signs(bits + b * row_bytes, entry, inside)
    tl.store(total + entry, sums, mask=inside)


@triton.jit
def _plus(one, other):
    """What a sum is made of: `tl.sum`, a compiled function itself, is out of the interpreter's reach."""
    return one + other


@triton.jit
def _dot(one, other):
    """The inner product of two columns."""
    return tl.reduce(one * other, 0, _plus)


@triton.jit
def _beyond(column, basis, place, inside, n_columns, RANK: tl.constexpr):
    """The column less its part in the span of the basis's first columns."""
    for k in range(n_columns):
        known = tl.load(basis + place * RANK + k, mask=inside, other=0.0)
        column -= _dot(column, known) * known
    return column


@triton.jit
def _next_basis(
    basis,
    product,
    previous,
    features,
    feature_stride,
    column_stride,
    NEGLIGIBLE: tl.constexpr,
    ROUNDING: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gram and Schmidt's columns, each twice orthogonalized, with the checks of `basis.next_basis`.

    A column in which nothing is new gives its place to the old one, and that, where it is in the span of those before
    it, to the first old one that is not. One program does it all.
    """
    place = tl.arange(0, BLOCK)
    inside = place < features
    largest = 0.0
    total = 0.0
    for j in range(RANK):
        column = tl.load(product + place * feature_stride + j * column_stride, mask=inside, other=0.0)
        square = _dot(column, column)
        largest = tl.maximum(largest, square)
        total += square
    least = NEGLIGIBLE * NEGLIGIBLE * tl.sqrt(largest)
    for j in range(RANK):
        column = tl.load(product + place * feature_stride + j * column_stride, mask=inside, other=0.0)
        length = tl.sqrt(_dot(column, column))
        is_new = (total < float("inf")) & (length > least)  # not with a NaN, either
        attempt = tl.where(is_new, -1, 0)
        size = 0.0
        column = tl.where(is_new, column / length, 0.0)
        while (size < ROUNDING) & (attempt <= RANK):
            if attempt >= 0:
                column = tl.load(
                    previous + place * RANK + tl.where(attempt == 0, j, attempt - 1), mask=inside, other=0.0
                )
            column = _beyond(column, basis, place, inside, j, RANK)
            size = tl.sqrt(_dot(column, column))
            attempt += 1
        column = _beyond(column / size, basis, place, inside, j, RANK)
        tl.store(basis + place * RANK + j, column / tl.sqrt(_dot(column, column)), mask=inside)
        tl.debug_barrier()  # the next column's threads read what others have written


def perturbed_product(
    coordinates: Tensor,  # (streams * rows, tokens, rank), of any strides
    noise: Noise,  # packed, or along a guide
    *,
    example: Tensor,  # (rows,) int64
    factors: tuple[float, ...],
    coefficients: Tensor | None,  # (out_features, rank) float32
    onto: Tensor | None,  # (streams * rows, tokens, out_features), contiguous
) -> Tensor:  # (streams * rows, tokens, out_features)
    """`perturb.perturbed_product`, in one kernel that reads x A, bits and C and writes y once."""
    n_rows, tokens, rank = coordinates.shape
    out_features = (noise if noise.guide is None else noise.guide).shape[-2]
    y = coordinates.new_empty(n_rows, tokens, out_features) if onto is None else onto
    assert y.is_contiguous()
    grid = (triton.cdiv(out_features, BLOCK_FEATURES), triton.cdiv(tokens, BLOCK_TOKENS), n_rows)
    _perturbed_product[grid](
        y,
        coordinates,
        noise.stored,
        y if noise.guide is None else noise.guide.contiguous(),
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
        GUIDED=noise.guide is not None,
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


def next_basis(product: Tensor, previous: Tensor) -> Tensor:  # both (in_features, rank) float32
    """`basis.next_basis` in one launch, up to rounding."""
    features, rank = product.shape
    basis = torch.empty(product.shape, device=product.device)
    block = triton.next_power_of_2(features)
    _next_basis[(1,)](
        basis,
        product,
        previous.contiguous(),
        features,
        *product.stride(),
        NEGLIGIBLE=NEGLIGIBLE,
        ROUNDING=ROUNDING,
        RANK=rank,
        BLOCK=block,
        num_warps=max(1, min(32, block // (32 * ENTRIES_OF_THREAD))),
    )
    return basis


def require_torchs_numbers(device: torch.device) -> None:
    """Raise ArithmeticError unless each kernel gives on a small case what torch gives on the CPU."""
    start, factors = starting_basis(48, 2), (0.5, -0.25)
    key = {"seed": 0, "step": 0, "layer": 0, "first_example": 0}
    packed, guided = draw_noise("sign", (2, 48, 2), **key), guided_noise("sign", 2, start, **key)
    weighted, product = torch.tensor([1.0, -2.0]), start @ torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    coordinates, example, there = start.view(4, 12, 2), torch.tensor([1, 0]), start.to(device)
    cases = {
        "update": (
            weighted_signs(packed.stored.to(device), weighted.to(device), shape=(48, 2)),
            torch_estimate.gradient_estimate(packed, weighted),
        ),
        "basis": (next_basis(product.to(device), there), torch_basis.next_basis(product, start)),
    }
    for name, noise in (("branch", packed), ("guided branch", guided)):
        placed = Noise(noise.shape, noise.stored.to(device), None if noise.guide is None else there)
        cases[name] = (
            perturbed_product(
                there.view(4, 12, 2), placed, example=example.to(device), factors=factors, coefficients=there, onto=None
            ),
            torch_perturb.perturbed_product(coordinates, noise, example=example, factors=factors, coefficients=start),
        )
    for name, (found, expected) in cases.items():
        if not torch.allclose(found.cpu(), expected, rtol=1e-4, atol=1e-4):
            raise ArithmeticError(f"the kernel of the {name} gives other numbers than torch")
