"""What waits outside the device until it is used, and the way there and back.

Beside a GPU tensors wait in the host's memory, and layers are streamed from there a block at a time
(stream.py). On a CPU they wait in a mapped file: the kernel reads its pages when they are used and may drop
them at any time, so they take no memory that another program could want.
"""

import errno
import mmap
import os
import warnings
import weakref
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from agzo_edge.budget.detect import cache_folder
from agzo_edge.config import RunConfig
from agzo_edge.errors import ModelError
from agzo_edge.model.linear import FrozenLinear
from agzo_edge.model.memory import give_back
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.model.stream import HostBlocks, HostHead, StreamedWeight, embed_on_host
from agzo_edge.model.weights import HeldWeight, rehoused

Place = Callable[[Tensor], Tensor]


class MappedFile:
    """A file without a name that tensors move into; it is gone when the process is, however that ends."""

    def __init__(self) -> None:
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)  # not the system's /tmp, which often is memory itself
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115  # open for as long as tensors may come
        except OSError as error:
            raise ModelError(f"{folder}: no file for what waits outside memory can be made there: {error}") from None
        weakref.finalize(self, self._file.close)

    def keep(self, tensor: Tensor) -> Tensor:
        """The same tensor, read-only, its bytes in the file.

        Raises ModelError when the disk is full, MemoryError when the process may not map more.
        """
        if not tensor.is_contiguous():
            return self.keep(tensor.mT).mT  # Conv1D's: a matmul rounds by layout
        data = tensor.detach().view(-1).view(torch.uint8)
        try:
            end = self._file.seek(0, os.SEEK_END)
            start = -(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self._file.seek(start)
            self._file.write(data.numpy().data)
            self._file.flush()
            window = mmap.mmap(self._file.fileno(), data.nbytes, access=mmap.ACCESS_READ, offset=start)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError(str(error)) from None
            raise ModelError(f"what waits outside memory cannot be written to the disk: {error}") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it is read-only, and nothing writes to a base
            return torch.frombuffer(window, dtype=tensor.dtype).view(tensor.shape)


def place_of(device: torch.device, *, outside: bool, dtype: torch.dtype | None = None) -> Place:
    """What moves a tensor to its place, in `dtype` where one is given: on the device, or where it waits outside."""
    if not outside:
        return lambda tensor: tensor.to(device, dtype or tensor.dtype, copy=True)
    if device.type != "cpu":
        return lambda tensor: tensor.to("cpu", dtype or tensor.dtype)
    file = MappedFile()
    return lambda tensor: file.keep(tensor.to(dtype or tensor.dtype))


def settle(model: EdgeModel, config: RunConfig) -> None:
    """Let the model work in the pieces, and with its weights in the places, that `config` says.

    What the pieces and places before it needed goes back to the system, also where only pieces change.
    """
    model.context.mlp_chunk_tokens = config.mlp_chunk_tokens
    model.logits_chunk_bytes = config.logits_chunk
    before, model.offloaded = model.offloaded, config.offload
    if (before == "none") != (config.offload == "none"):
        place_embeddings(model.network, place_of(model.device, outside=config.offload != "none"))
    if (before == "layers") != (config.offload == "layers"):
        place = place_of(model.device, outside=config.offload == "layers")
        for layer in movable_layers(model).values():
            layer.base = rehoused(layer.base, place)
    if model.device.type != "cpu":
        fetch_from_host(model)
    give_back(model.device)


def place_embeddings(network: Any, place: Place) -> None:
    """Move the embeddings and the head, which may be one tensor, and stay one."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # by address: what was there, which keeps the address, and is now

    def move(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in moved:
            moved[tensor.data_ptr()] = tensor, place(tensor)
        return moved[tensor.data_ptr()][1]

    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data = move(module.weight.data)
    head = network.get_output_embeddings()
    head.base = rehoused(head.base, move)


def movable_layers(model: EdgeModel) -> dict[str, FrozenLinear]:
    """The layers that may be streamed, by name: all but the head, and those that learning writes to."""
    layers = model.frozen_layers.items()
    return {name: layer for name, layer in layers if layer is not model.head and not isinstance(layer.base, HeldWeight)}


def fetch_from_host(model: EdgeModel) -> None:
    """Beside a GPU: let what is on the host come to the device when it is used, and what is there stay."""
    outside = model.offloaded != "none"
    while model.host_hooks:
        model.host_hooks.pop().remove()
    for module in model.network.modules():
        if isinstance(module, nn.Embedding):
            module.to("cpu" if outside else model.device)  # its buffers too: Gemma scales what it looked up
            model.host_hooks += embed_on_host(module, device=model.device) if outside else []
    head = model.head
    name = next(name for name, module in model.network.named_modules() if module is head)
    part_bytes = model.logits_chunk_bytes
    model.network.set_submodule(
        name,
        HostHead(head.base, head.bias, device=model.device, part_bytes=part_bytes)
        if outside
        else FrozenLinear(head.base, head.bias),
    )
    layers = {
        name: layer for name, layer in movable_layers(model).items() if not isinstance(layer.base, StreamedWeight)
    }
    if model.offloaded == "layers" and layers:
        HostBlocks(layers, device=model.device)
