"""Weights that wait in the host's memory beside a GPU, and come when a layer needs them.

A forward-only step needs each layer once, in order. So blocks of layers are copied to the device one ahead:
two buffers, each as large as the largest block, one in use while the other fills, on a stream of its own.
Repeated use within a block (micro-batches of tokens in an MLP) costs no second copy.
"""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor, nn

from agzo_edge.model.linear import FrozenLinear
from agzo_edge.model.weights import BaseWeight
from agzo_edge.numerics.products import linear

ALIGNMENT_BYTES = 256  # of each tensor within a block's buffer: what CUDA's own allocations keep to
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


class HostBlock:
    """The stored tensors of one block's layers, one after another in one buffer of the host's memory."""

    def __init__(self, weights: Sequence[BaseWeight]) -> None:
        parts = [tensor for weight in weights for tensor in weight.movable()]
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + -(-part.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        self.layout = [(start, part.dtype, part.shape, part.stride()) for start, part in zip(ends, parts, strict=False)]
        self.buffer = pinned_bytes(ends[-1])
        for view, part in zip(self._views(self.buffer), parts, strict=True):
            view.copy_(part)
        self.weights = self.weights_in(self.buffer, weights)

    def weights_in(self, buffer: Tensor, weights: Sequence[BaseWeight]) -> list[BaseWeight]:
        """The weights with their tensors in `buffer`, (bytes,) uint8, which holds the block's bytes."""
        views = self._views(buffer)
        return [weight.with_tensors(*islice(views, len(weight.movable()))) for weight in weights]

    def _views(self, buffer: Tensor) -> Iterator[Tensor]:
        for start, dtype, shape, stride in self.layout:  # Conv1D's strides too: a matmul rounds by layout
            n_bytes = shape.numel() * dtype.itemsize
            yield buffer[start : start + n_bytes].view(dtype).as_strided(shape, stride)


def pinned_bytes(n_bytes: int) -> Tensor:
    """Bytes of the host's memory, pinned where there is a GPU, so that a copy runs beside the computation.

    Registered and not allocated as pinned: torch's pinned allocator rounds up to a power of two, and at
    these sizes that would be a third of the model again. Memory that cannot be registered serves unpinned.
    """
    buffer = torch.empty(n_bytes, dtype=torch.uint8)
    if torch.cuda.is_available() and n_bytes:
        if int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), n_bytes, 0)) == 0:
            weakref.finalize(buffer, _unpin, buffer.data_ptr()).atexit = False
        else:
            with suppress(RuntimeError):  # CUDA tells of a failed call once more, at the next kernel's start
                torch.zeros(1, device="cuda")
    return buffer


def _unpin(address: int) -> None:
    """Let go of pinned memory before it is freed: whoever is given the same addresses could not pin them."""
    torch.cuda.synchronize()  # a copy out of it may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


class HostBlocks:
    """All layers of a model in blocks on the host, the one in use and the next one on the device.

    Made for its effect: the layers' weights are replaced by streamed ones.
    """

    def __init__(self, layers: Mapping[str, FrozenLinear], *, device: torch.device) -> None:
        self.blocks: list[HostBlock] = []
        for _, names in groupby(layers, key=block_of):
            members = [layers[name] for name in names]
            block = HostBlock([layer.base for layer in members])
            for place, layer in enumerate(members):
                layer.base = StreamedWeight(self, len(self.blocks), place, block.weights[place])
            self.blocks.append(block)
        largest = max(block.buffer.numel() for block in self.blocks)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._present, self._coming = -1, -1  # block in use, block whose copy is under way or done
        self._on_device: list[BaseWeight] = []

    def weight(self, block: int, place: int) -> BaseWeight:
        """The `place`-th weight of a block, on the device; entering a block begins the next one's copy."""
        if block != self._present:
            if block != self._coming:
                self._copy(block)
            if self._copies is not None:
                torch.cuda.current_stream(self._copies.device).wait_stream(self._copies)
            self._slots.reverse()  # what was filled is in use now, and the other one may be filled
            self._present = block
            self._on_device = self.blocks[block].weights_in(self._slots[0], self.blocks[block].weights)
            if len(self.blocks) > 1:
                self._copy((block + 1) % len(self.blocks))
        return self._on_device[place]

    def _copy(self, block: int) -> None:
        """Begin to copy a block into the buffer that is not in use, once the layers that used it are done."""
        source = self.blocks[block].buffer
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self._copies.device))
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            self._slots[1][: source.numel()].copy_(source, non_blocking=True)
        self._coming = block


def block_of(name: str) -> str:
    """The block that a layer belongs to: "model.layers.3" for all of its layers; else the layer's own name."""
    found = _BLOCK.match(name)
    return found.group(1) if found else name


class StreamedWeight:
    """A weight that waits on the host and is dequantized from its copy on the device."""

    def __init__(self, blocks: HostBlocks, block: int, place: int, on_host: BaseWeight) -> None:
        self._blocks, self._block, self._place = blocks, block, place
        self.on_host = on_host
        self.shape = on_host.shape

    @property
    def kind(self) -> str:
        """How it is stored."""
        return self.on_host.kind

    def dense(self) -> Tensor:
        """The weight (out_features, in_features) on the device; valid until the next call."""
        return self._blocks.weight(self._block, self._place).dense()

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors on the host."""
        return self.on_host.stored()

    def movable(self) -> tuple[Tensor, ...]:
        """The tensors on the host."""
        return self.on_host.movable()

    def with_tensors(self, *tensors: Tensor) -> Any:
        """The weight elsewhere, no longer streamed."""
        return self.on_host.with_tensors(*tensors)


class HostHead(FrozenLinear):
    """A head whose weight waits on the host, and is used a part of the vocabulary at a time."""

    def __init__(self, weight: BaseWeight, bias: Tensor | None, *, device: torch.device, part_bytes: int) -> None:
        super().__init__(weight, bias)
        self.device = device
        self._part: tuple[int, Tensor] | None = None  # on the device: the part in use, by its first word
        self.words_at_once = max(1, part_bytes * self.out_features // weight.dense().nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocabulary)."""
        return torch.cat([part(x) for _, part in self.parts()], dim=-1)

    def parts(self) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
        """The parts of the vocabulary in order, each with its head; one at a time is on the device."""
        for start in range(0, self.out_features, self.words_at_once):
            words = slice(start, min(start + self.words_at_once, self.out_features))
            yield words, partial(self._logits_of, words=words)
        self._part = None

    def _logits_of(self, x: Tensor, *, words: slice) -> Tensor:
        """(..., hidden_size) -> (..., words); copies the part's weight unless it was the last one in use."""
        if self._part is None or self._part[0] != words.start:
            self._part = None  # given back before the next one is asked for
            self._part = words.start, self.base.dense()[words].to(self.device)
        bias = None if self.bias is None else self.bias[words]
        return linear(x, self._part[1], bias)


def embed_on_host(module: nn.Embedding, *, device: torch.device) -> list[Any]:
    """Let embeddings that are on the host be looked up there; the handles that undo it."""

    def to_host(_module: nn.Module, args: Any, named: Any) -> tuple[Any, Any]:  # OPT names its positions
        return tuple(_on_host(each) for each in args), {name: _on_host(each) for name, each in named.items()}

    return [
        module.register_forward_pre_hook(to_host, with_kwargs=True),
        module.register_forward_hook(lambda *call: call[2].to(device)),
    ]


def _on_host(argument: Any) -> Any:
    return argument.to("cpu") if isinstance(argument, Tensor) else argument
