"""Noise that anyone can draw again: a function of (run seed, step, layer, example).

The generator is Philox4x64, counter-based: its raw 64-bit words are the same on every machine and in
every numpy release. The key is (seed, layer) and the counter (block, 0, 0, step), so any example's noise
is reached without drawing the others. Signs are those raw bits, packed eight to a byte, and are
unpacked on the device that uses them; a CPU and a GPU therefore see the same noise, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORDS_PER_BLOCK = 4  # one Philox4x64 counter value yields four 64-bit words
BITS_PER_WORD = 64
FLOOR = 0.01  # of the largest coordinate's energy, added to each: what hardly moves is not blown up
ROUNDING_LAYERS = 2**32  # added to a layer's number: roundings share no random word with the noise

NoiseKind = Literal["sign", "gaussian"]


@dataclass(frozen=True)
class Noise:
    """The noise R of one layer, a slice for each example: packed signs or Gaussian values E, or e_b D, D a guide."""

    shape: tuple[int, int, int]  # of E: (examples, out_features, rank); along a guide (examples, 1, 1)
    stored: Tensor  # (examples, bytes) uint8 of `sign_bits`, or the values themselves in float32, as along a guide
    guide: Tensor | None = None  # D (out_features, rank) float32; None: all directions, R = E

    @property
    def is_packed(self) -> bool:
        """Whether `stored` holds a bit for each entry."""
        return self.stored.dtype is torch.uint8

    def placed(self, place: Callable[[Tensor], Tensor]) -> "Noise":
        """The same noise, stored where `place` puts it."""
        return replace(self, stored=place(self.stored))

    def entries(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """E, of `shape`."""
        return unpack_signs(self.stored, self.shape, dtype) if self.is_packed else self.stored.to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """R (examples, out_features, rank)."""
        entries = self.entries(dtype)
        return entries if self.guide is None else entries * self.guide.to(dtype)


def raw_words(
    n_words: int,  # for each example; rounded up to whole Philox blocks
    *,
    seed: int,
    step: int,
    layer: int,
    first_example: int,
    n_examples: int,
) -> NDArray[np.uint64]:  # (examples, words)
    """The raw random words of consecutive examples of one layer at one step.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox4x64-10).
    """
    n_blocks = -(-n_words // WORDS_PER_BLOCK)
    generator = np.random.Philox(key=[seed, layer], counter=[first_example * n_blocks, 0, 0, step])
    words = generator.random_raw(n_examples * n_blocks * WORDS_PER_BLOCK)
    return np.asarray(words, dtype=np.uint64).reshape(n_examples, -1)[:, :n_words]


def rounding_bits(
    shape: tuple[int, int],
    *,
    seed: int,
    step: int,
    layer: int,
) -> Tensor:  # `shape`, int32 in [0, 2**16)
    """The random bits of one stochastic rounding, drawn beside the noise of that layer and step."""
    n_values = shape[0] * shape[1]
    words = raw_words(
        -(-n_values // 4), seed=seed, step=step, layer=layer + ROUNDING_LAYERS, first_example=0, n_examples=1
    )
    halves = np.ascontiguousarray(words.astype("<u8", copy=False)).view("<u2").reshape(-1)[:n_values]
    return torch.from_numpy(halves.astype(np.int32)).reshape(shape)


def sign_bits(shape: tuple[int, int, int], **key: int) -> Tensor:
    """Packed random bits for `shape` = (examples, out_features, rank), as (examples, bytes) uint8.

    `key` is the seed, step, layer and first_example of `raw_words`. 1/8 byte for each noise entry.
    """
    n_examples, out_features, rank = shape
    n_bits = out_features * rank
    words = raw_words(-(-n_bits // BITS_PER_WORD), n_examples=n_examples, **key)
    packed = np.ascontiguousarray(words.astype("<u8", copy=False)).view(np.uint8)
    return torch.from_numpy(packed[:, : -(-n_bits // 8)].copy())


def unpack_signs(
    bits: Tensor,  # (examples, bytes) uint8
    shape: tuple[int, int, int],  # (examples, out_features, rank)
    dtype: torch.dtype,
) -> Tensor:  # (examples, out_features, rank) of -1 and +1
    """The signs held in packed bits, bit i of byte j being entry 8 j + i; a set bit is +1.

    By a table of all bytes: a CPU shifts and masks six times as long (measured).
    """
    n_examples, out_features, rank = shape
    signs = _signs_of_bytes(dtype, bits.device).index_select(0, bits.reshape(-1).int())
    return signs.view(n_examples, -1)[:, : out_features * rank].reshape(shape)


@cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:  # (256, 8)
    """The eight signs that each byte holds, the lowest bit's first."""
    places = torch.arange(8, device=device)
    return (torch.arange(256, device=device).unsqueeze(-1) >> places & 1).to(dtype) * 2 - 1


def gaussian_noise(shape: tuple[int, int, int], **key: int) -> Tensor:
    """Standard normal noise (examples, out_features, rank), float32, on the CPU.

    Box and Muller's transform of the raw words in float64, rounded once: the words are exact on every
    machine, the rounded values equal up to the last bit of the mathematical library's logarithm.
    """
    n_examples, out_features, rank = shape
    n_values = out_features * rank
    words = raw_words(2 * -(-n_values // 2), n_examples=n_examples, **key)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1): log never meets 0
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0::2]))
    angle = 2.0 * np.pi * uniform[:, 1::2]
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :n_values]
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def draw_noise(
    kind: NoiseKind,
    shape: tuple[int, int, int],  # (examples, out_features, rank)
    **key: int,
) -> Noise:
    """The noise R of one layer on the CPU, one slice for each example; `key`: seed, step, layer, first_example."""
    return Noise(shape, gaussian_noise(shape, **key) if kind == "gaussian" else sign_bits(shape, **key))


def guided_noise(
    kind: NoiseKind,
    n_examples: int,
    guide: Tensor,  # D (out_features, rank) float32
    **key: int,
) -> Noise:
    """The noise R_b = e_b D: one random number for each example, drawn as `draw_noise` does; they stay on the CPU.

    Source: guided directions, Maheswaranathan et al., arXiv 1806.10230, with one direction for each layer.
    """
    return Noise((n_examples, 1, 1), _numbers(kind, n_examples, **key), guide)


@lru_cache(maxsize=1024)  # layers, more than a model has
def _numbers(kind: NoiseKind, n_examples: int, **key: int) -> Tensor:  # (examples, 1, 1) float32
    """A number for each example, which is never written to; of a batch in one piece the update asks for it again."""
    return draw_noise(kind, (n_examples, 1, 1), **key).entries()


def evened(
    guess: Tensor,  # (..., out_features, rank): a batch's guess at dL/dC
    energies: Tensor,  # (..., rank): sums of squares of the coordinates that it was made of
) -> Tensor:  # (..., out_features, rank)
    """The guess with each column divided by the size of its coordinate.

    The leading coordinate is mostly what all tokens share, and as large as it is its column would take the noise from
    all others. Coordinates in the leading directions of the inputs are nearly uncorrelated, so this is the guess times
    the inverse root of their covariance, as the right side of Shampoo, arXiv 1802.09568, on a diagonal.
    """
    return guess / (energies + FLOOR * energies.amax(-1, keepdim=True)).sqrt().unsqueeze(-2)


def next_guide(
    guess: Tensor,  # (..., out_features, rank): a batch's guess at dL/dC
    previous: Tensor,  # (..., out_features, rank) float32: the guide before, in the present basis
    *,
    memory: float,
) -> Tensor:  # (..., out_features, rank) float32, of mean square 1 or zero
    """The direction of the guess, with `memory` of the guide before: what agrees from batch to batch adds up.

    A guess that is zero, or not finite, leaves the guide before.
    """
    guess = _unit(guess.float())
    is_known = guess.flatten(-2).any(-1)[..., None, None]
    return _unit(torch.where(is_known, memory * _unit(previous) + (1.0 - memory) * guess, previous))


def _unit(direction: Tensor) -> Tensor:
    """Each direction with mean square 1, as full noise of signs has; zero for zero and for what is not finite."""
    tiny = torch.finfo(torch.float32).tiny
    largest = torch.linalg.vector_norm(direction, torch.inf, dim=(-2, -1), keepdim=True)
    direction = direction / largest.clamp_min(tiny)  # first: squares of the smallest numbers are zero
    direction = direction / direction.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(tiny)
    return direction.nan_to_num(0.0)  # all of it, if anything was not finite: by its largest everything was divided
