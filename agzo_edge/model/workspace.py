"""The one buffer that quantized weights are dequantized into, layer after layer."""

import math

import torch
from torch import Tensor


class Workspace:
    """Memory for one dequantized weight at a time, as large as the largest that will come.

    A fresh buffer for every layer costs more than filling it: of dequantizing 4096 x 4096 to float32 on a CPU three
    quarters were page faults (docs/decisions/0041), and a GPU's allocator would keep one for each size.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}  # uint8; a weight that waits on the host may be read there
        self._largest_bytes = 0

    def expect(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Make room for such a weight when the buffer is first asked for."""
        self._largest_bytes = max(self._largest_bytes, math.prod(shape) * dtype.itemsize)

    def tensor(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialized memory of this shape, valid until the next call."""
        self.expect(shape, dtype)
        held = self._buffers.get(device)
        if held is None or held.numel() < self._largest_bytes:
            self._buffers[device] = held = torch.empty(0)  # given back before the larger one is asked for
            self._buffers[device] = held = torch.empty(self._largest_bytes, dtype=torch.uint8, device=device)
        return held[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
