"""Products in blocks, against torch's own, and what they leave in memory."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.numerics.products import BLOCK_ROWS, WIDTH, add_linear, linear, whole_blocks, whole_widths

ROWS = st.integers(1, 3 * BLOCK_ROWS + 1)
DTYPES = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))


def is_close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to rounding at the size of the whole: 16-bit sums are kept in float32, and rounded once."""
    error = (got.float() - wanted.float()).abs().max()
    return bool(error <= 2 * torch.finfo(got.dtype).eps * wanted.float().abs().max() + 1e-30)


@given(rows=ROWS, dtype=DTYPES, streams=st.integers(1, 2), has_bias=st.booleans())
def test_linear_is_torchs(rows: int, dtype: torch.dtype, streams: int, has_bias: bool) -> None:
    """Whatever the number of rows, in whatever dtype."""
    x, weight = torch.randn(streams, rows, 24).to(dtype), torch.randn(40, 24).to(dtype)
    bias = torch.randn(40).to(dtype) if has_bias else None
    wanted = x.float() @ weight.float().mT + (0 if bias is None else bias.float())
    got = linear(x, weight, bias)
    assert got.shape == wanted.shape
    assert got.dtype is dtype
    assert is_close(got, wanted)


@given(rows=ROWS, dtype=DTYPES, factor=st.sampled_from((1.0, -0.5, 0.0)))
def test_add_linear_adds_in_place(rows: int, dtype: torch.dtype, factor: float) -> None:
    """The same tensor comes back, with the product added to it."""
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(40, 24).to(dtype)
    onto = torch.randn(rows, 40).to(dtype)
    wanted = onto.float() + factor * (x.float() @ weight.float().mT)
    assert add_linear(onto, x, weight, factor=factor) is onto
    assert is_close(onto, wanted)


@given(rows=ROWS, has_bias=st.booleans())
def test_the_gradient_goes_back_through_the_blocks(rows: int, has_bias: bool) -> None:
    """dL/dx = dL/dy W, the same as torch's."""
    x = torch.randn(rows, 24).bfloat16().requires_grad_()
    weight, error = torch.randn(40, 24).bfloat16(), torch.randn(rows, 40).bfloat16()
    linear(x, weight, torch.randn(40).bfloat16() if has_bias else None).backward(error)
    assert x.grad is not None
    assert is_close(x.grad, error.float() @ weight.float())


@given(rows=st.integers(1, 10_000))
def test_whole_blocks_leave_nothing_to_fill(rows: int) -> None:
    """Nearly as many rows as allowed, in whole blocks, but for fewer than one block."""
    whole = whole_blocks(rows)
    assert whole == rows if rows <= BLOCK_ROWS else whole % BLOCK_ROWS == 0
    assert rows - BLOCK_ROWS < whole <= rows


def test_widths_are_filled_with_zeros_in_16_bit_alone() -> None:
    """The product of filled factors is the product."""
    columns = torch.randn(24, WIDTH + 1)
    assert whole_widths(columns) is columns
    filled = whole_widths(columns.bfloat16())
    assert filled.shape == (24, 2 * WIDTH)
    assert torch.equal(filled[:, : WIDTH + 1], columns.bfloat16())
    assert not filled[:, WIDTH + 1 :].any()


GROWTH = f"""
import torch
from agzo_edge.model.memory import anonymous_bytes
from agzo_edge.numerics.products import linear
weight = torch.randn(1024, 256).bfloat16()
def meet(lengths):
    for rows in lengths:
        linear(torch.randn(rows, 256).bfloat16(), weight)
    return anonymous_bytes()
first = meet(range(1, {BLOCK_ROWS + 1}))
print(meet(range({BLOCK_ROWS + 1}, 500)) - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_lengths_that_were_met() -> None:
    """oneDNN's code for 340 numbers of rows took 150 MiB and more before there were blocks."""
    told = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True)
    assert int(told.stdout) < 8 * 2**20
