"""A perturbed product with noise along a guide."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agzo_edge.numerics.noise import guided_noise
from agzo_edge.numerics.perturb import perturbed_product

KEY = {"seed": 7, "step": 3, "layer": 5, "first_example": 0}


@settings(max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 4)),
    factors=st.sampled_from([(0.03, -0.03), (0.03, 0.0), (1.0,)]),
    learned=st.booleans(),
    onto=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_noise_along_a_guide_gives_what_its_dense_entries_give(
    sizes: tuple[int, int, int, int],
    factors: tuple[float, ...],
    learned: bool,
    onto: bool,
    dtype: torch.dtype,
) -> None:
    rows, tokens, out_features, rank = sizes
    generator = torch.Generator().manual_seed(rows + tokens)
    coordinates = torch.randn(len(factors) * rows, tokens, rank, generator=generator).to(dtype)
    c = torch.randn(out_features, rank, generator=generator) if learned else None
    y = torch.randn(*coordinates.shape[:2], out_features, generator=generator).to(dtype) if onto else None
    noise = guided_noise("sign", 2, torch.randn(out_features, rank, generator=generator), **KEY)
    example = torch.arange(rows) % 2
    weights = torch.cat([factor * noise.dense()[example] for factor in factors])
    expected = torch.bmm(coordinates.float(), (weights if c is None else weights + c).mT)
    expected = expected if y is None else expected + y.float()
    got = perturbed_product(coordinates, noise, example=example, factors=factors, coefficients=c, onto=y)
    assert got.dtype is dtype
    assert y is None or got is y
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    assert_close(got.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
