"""The same key, the same noise, for ever."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agzo_edge.numerics.noise import (
    FLOOR,
    NoiseKind,
    draw_noise,
    evened,
    gaussian_noise,
    guided_noise,
    next_guide,
    raw_words,
    rounding_bits,
    sign_bits,
    unpack_signs,
)

KEY = {"seed": 7, "step": 3, "layer": 5}
FEW = settings(max_examples=20)
# Journals are replayed from these words: a change here makes every old adapter unreadable.
GOLDEN_WORDS = [
    [
        "0xf58f7cc8ecc571d5",
        "0x8f56e430d698e776",
        "0xdaae38002978226a",
        "0xdfa41ecf923070f7",
        "0xf76c2e2574e245be",
    ],
    [
        "0xb60545255193afe2",
        "0x55dcc76e9f3b417e",
        "0xc1d278a4c89ba177",
        "0xee80e07a7d4ce7d8",
        "0x274886633c67eee0",
    ],
]
GOLDEN_SIGN_BYTES = "694e953c6a"
GOLDEN_GAUSSIAN = [-0.84278828, 0.19939455, -1.43271983, 0.44594046]


def test_the_words_of_a_key_never_change() -> None:
    words = raw_words(5, first_example=1, n_examples=2, **KEY)
    assert [[hex(word) for word in row] for row in words.tolist()] == GOLDEN_WORDS


def test_the_signs_and_the_gaussians_of_a_key_never_change() -> None:
    assert bytes(sign_bits((1, 11, 3), first_example=1, **KEY)[0].numpy()).hex() == GOLDEN_SIGN_BYTES
    values = gaussian_noise((1, 2, 2), first_example=1, **KEY).flatten()
    torch.testing.assert_close(values, torch.tensor(GOLDEN_GAUSSIAN), rtol=1e-6, atol=0)


def test_words_are_those_of_philox_as_published() -> None:
    # Random123's known answer for counter and key of zero; numpy counts up before use.
    generator = np.random.Philox(key=[0, 0], counter=[2**64 - 1] * 4)
    assert hex(int(generator.random_raw())) == "0x16554d9eca36314c"


@FEW
@given(
    first=st.integers(0, 40),
    n=st.integers(1, 6),
    out_features=st.integers(1, 33),
    rank=st.integers(1, 5),
    kind=st.sampled_from(["sign", "gaussian"]),
)
def test_an_examples_noise_depends_on_its_number_alone(
    first: int, n: int, out_features: int, rank: int, kind: str
) -> None:
    many = draw_noise(kind, (first + n, out_features, rank), first_example=0, **KEY).dense()
    some = draw_noise(kind, (n, out_features, rank), first_example=first, **KEY).dense()
    assert torch.equal(many[first:], some)


def test_every_part_of_the_key_counts() -> None:
    shape = (2, 64, 4)
    base = {**KEY, "first_example": 0}
    draws = [draw_noise("sign", shape, **base).dense()]
    draws += [draw_noise("sign", shape, **{**base, name: base[name] + 1}).dense() for name in KEY]
    draws += [draw_noise("sign", shape, **{**base, "first_example": 2}).dense()]
    for i, a in enumerate(draws):
        assert not torch.equal(a[0], a[1])
        for b in draws[:i]:
            assert abs(float((a * b).mean())) < 0.2  # 512 signs: 4.5 standard deviations


def test_the_largest_seed_draws() -> None:
    signs = draw_noise("sign", (1, 4, 1), seed=2**63 - 1, step=2**40, layer=2**62, first_example=0).dense()
    assert signs.abs().flatten().tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_signs_are_unpacked_lowest_bit_first(dtype: torch.dtype) -> None:
    bits = torch.tensor([[0b00000101, 0b10]], dtype=torch.uint8)
    signs = unpack_signs(bits, (1, 5, 2), dtype)
    assert signs.dtype is dtype
    assert signs.flatten().tolist() == [1, -1, 1, -1, -1, -1, -1, -1, -1, 1]


@FEW
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 65), st.integers(1, 7)))
def test_packed_signs_hold_one_bit_for_each_entry_of_any_shape(shape: tuple[int, int, int]) -> None:
    bits = sign_bits(shape, first_example=0, **KEY)
    assert bits.shape == (shape[0], -(-shape[1] * shape[2] // 8))
    by_numpy = np.unpackbits(bits.numpy(), axis=1, bitorder="little")[:, : shape[1] * shape[2]]
    expected = torch.from_numpy(by_numpy.astype(np.float32) * 2 - 1).reshape(shape)
    assert torch.equal(unpack_signs(bits, shape, torch.float32), expected)


def test_signs_have_mean_0_and_variance_1_and_do_not_repeat_across_features() -> None:
    signs = draw_noise("sign", (64, 512, 4), first_example=0, **KEY).dense()
    assert signs.square().unique().tolist() == [1.0]
    assert abs(float(signs.mean())) < 5 / signs.numel() ** 0.5
    flat = signs.reshape(64, -1)
    overlaps = flat @ flat.T / flat.shape[1] - torch.eye(64)
    assert float(overlaps.abs().max()) < 6 / flat.shape[1] ** 0.5


def test_gaussian_noise_has_the_moments_of_a_standard_normal() -> None:
    values = draw_noise("gaussian", (64, 512, 4), first_example=0, **KEY).dense().double()
    n = values.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(values.pow(power).mean()) - moment) < 5 * (variance / n) ** 0.5
    assert float((values[:, 0] * values[:, 1]).mean()) < 5 / (64 * 4) ** 0.5


def test_gaussian_noise_of_an_odd_number_of_entries_is_finite_and_whole() -> None:
    values = gaussian_noise((3, 7, 1), first_example=0, **KEY)
    assert values.shape == (3, 7, 1)
    assert values.isfinite().all()
    assert values.unique().numel() == 21


def test_rounding_bits_are_uniform_and_their_own() -> None:
    bits = rounding_bits((301, 333), seed=7, step=3, layer=5)
    assert bits.dtype is torch.int32
    assert 0 <= int(bits.min()) < 10 < 2**16 - 10 < int(bits.max()) < 2**16
    assert float(bits.float().mean()) == pytest.approx(2**15 - 0.5, rel=0.01)
    assert torch.equal(bits, rounding_bits((301, 333), seed=7, step=3, layer=5))
    assert not torch.equal(bits, rounding_bits((301, 333), seed=7, step=4, layer=5))


@FEW
@given(kind=st.sampled_from(["sign", "gaussian"]), out_features=st.integers(1, 30), rank=st.integers(1, 5))
def test_guided_noise_is_a_random_multiple_of_the_guide_for_each_example(
    kind: NoiseKind, out_features: int, rank: int
) -> None:
    guide = torch.linspace(-1, 2, out_features * rank).view(out_features, rank)
    noise = guided_noise(kind, 3, guide, first_example=0, **KEY)
    multiples = draw_noise(kind, (3, 1, 1), first_example=0, **KEY).dense()
    assert torch.equal(noise.dense(), multiples * guide)
    later = guided_noise(kind, 2, guide, first_example=1, **KEY)
    assert torch.equal(later.dense(), noise.dense()[1:])


DIRECTIONS = st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=6, max_size=6)


@FEW
@given(guess=DIRECTIONS, previous=DIRECTIONS, memory=st.floats(0, 0.99))
def test_a_guide_has_the_size_of_signs_whatever_it_is_made_from(
    guess: list[float], previous: list[float], memory: float
) -> None:
    made = next_guide(torch.tensor(guess).view(3, 2), torch.tensor(previous).view(3, 2), memory=memory)
    size = float(made.square().mean())
    assert size == pytest.approx(1.0, rel=1e-4) or (size == 0.0)


@FEW
@given(sizes=st.lists(st.floats(0.2, 5.0), min_size=4, max_size=4))
def test_an_evened_guess_does_not_know_how_large_its_coordinates_are(sizes: list[float]) -> None:
    generator = torch.Generator().manual_seed(1)
    coordinates, error = torch.randn(50, 4, generator=generator), torch.randn(50, 7, generator=generator)
    unit, scaled = coordinates / coordinates.norm(dim=0), coordinates * torch.tensor(sizes)
    made = evened(error.T @ scaled, scaled.square().sum(0))
    shrunk = made / (error.T @ unit)  # what the floor takes: little, where sizes are within a factor of 25 or so
    assert torch.all((shrunk > 0.2) & (shrunk <= 1.0))
    assert_close(shrunk, shrunk[:1].expand_as(shrunk), rtol=1e-3, atol=0)


def test_a_coordinate_that_hardly_moves_is_not_blown_up() -> None:
    made = evened(torch.tensor([[1.0, 1e-4, 0.0]]), torch.tensor([1.0, 1e-8, 0.0]))
    assert_close(made, torch.tensor([[(1 + FLOOR) ** -0.5, 1e-4 * FLOOR**-0.5, 0.0]]), rtol=1e-3, atol=0)


def test_a_guide_is_the_mean_of_two_directions_and_outlives_a_guess_that_says_nothing() -> None:
    guess, previous = torch.randn(5, 3), torch.randn(5, 3)
    unit = [x / x.square().mean().sqrt() for x in (guess, previous)]
    mixed = 0.7 * unit[0] + 0.3 * unit[1]
    assert_close(next_guide(1e-20 * guess, 5e9 * previous, memory=0.3), mixed / mixed.square().mean().sqrt())
    for nothing in (torch.zeros(5, 3), torch.full((5, 3), torch.nan), torch.full((5, 3), torch.inf)):
        assert_close(next_guide(nothing, previous, memory=0.3), unit[1])
        assert_close(next_guide(nothing, previous, memory=0.0), unit[1])
    assert not next_guide(torch.zeros(5, 3), torch.zeros(5, 3), memory=0.3).any()
