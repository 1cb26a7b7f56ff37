"""Noise that anyone can draw again: a function of (run seed, step, layer, example).

The generator is Philox4x64, counter-based: its raw 64-bit words are the same on every machine and in
every numpy release. The key is (seed, layer) and the counter (block, 0, 0, step), so any example's noise
is reached without drawing the others. Signs are those raw bits, packed eight to a byte, and are
unpacked on the device that uses them; a CPU and a GPU therefore see the same noise, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORDS_PER_BLOCK = 4  # one Philox4x64 counter value yields four 64-bit words
BITS_PER_WORD = 64
ROUNDING_LAYERS = 2**32  # added to a layer's number: roundings share no random word with the noise

NoiseKind = Literal["sign", "gaussian"]


@dataclass(frozen=True)
class Noise:
    """The noise R of one layer, a slice for each example: packed signs or Gaussian values E, or S E of a span S."""

    shape: tuple[int, int, int]  # (examples, out_features, rank); inside a span (examples, directions, rank)
    stored: Tensor  # (examples, bytes) uint8 of `sign_bits`, or the values themselves in float32
    span: Tensor | None = None  # S (out_features, directions) float32; None: all directions, R = E

    @property
    def is_packed(self) -> bool:
        """Whether `stored` holds a bit for each entry."""
        return self.stored.dtype is torch.uint8

    @property
    def inside(self) -> "Noise":
        """E, the noise by its coordinates in the span."""
        return replace(self, span=None)

    def placed(self, place: Callable[[Tensor], Tensor]) -> "Noise":
        """The same noise, stored where `place` puts it."""
        return replace(self, stored=place(self.stored))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The entries (examples, out_features, rank)."""
        entries = unpack_signs(self.stored, self.shape, dtype) if self.is_packed else self.stored.to(dtype)
        return entries if self.span is None else self.span.to(dtype) @ entries


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
    shape: tuple[int, int, int],  # (examples, out_features, rank)
    guide: Tensor,  # U (out_features, directions) float32, orthonormal columns
    **key: int,
) -> Noise:
    """The noise R = sqrt(out_features / directions) U E, E drawn as `draw_noise` does.

    Its entries have mean square 1, as those of full noise have; with as many directions as outputs it is full noise.
    Source: guided directions, Maheswaranathan et al., arXiv 1806.10230, here on the side of the outputs, as AGZO's
    basis is on that of the inputs.
    """
    n_examples, out_features, rank = shape
    directions = guide.shape[1]
    drawn = draw_noise(kind, (n_examples, directions, rank), **key)
    return replace(drawn, span=guide * (out_features / directions) ** 0.5)
