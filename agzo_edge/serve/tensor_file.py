"""Writing a safetensors file of any size while holding one tensor: the lengths are known before the numbers.

The format is eight bytes of header length, a JSON header with each tensor's type, shape and place, and the
tensors' bytes. Its own library wants all tensors of a file in memory at once.
Source: https://github.com/huggingface/safetensors, section Format.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agzo_edge.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose numbers are read, or computed, when they are asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        """The length of its numbers in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def lazy_tensors(path: Path) -> list[LazyTensor]:
    """The tensors of a safetensors file, in the order of their names; their numbers stay in the file.

    Raises ModelError when it is no sound safetensors file.
    """
    try:
        file = safe_open(path, framework="pt")
        return [_lazy(file, name, path) for name in sorted(file.keys())]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from None


def _lazy(file: safe_open, name: str, path: Path) -> LazyTensor:
    entry = file.get_slice(name)
    dtype = _DTYPES.get(entry.get_dtype())
    if dtype is None:
        raise ModelError(f"{path}: {name} is stored as {entry.get_dtype()}, which cannot be read")
    return LazyTensor(name, tuple(entry.get_shape()), dtype, lambda: file.get_tensor(name))


def stored_as(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """`tensor` in `dtype` where it holds floats, and as it is otherwise.

    Reading it raises ModelError for a number that passes the range of `dtype`.
    """
    if tensor.dtype == dtype or not tensor.dtype.is_floating_point:
        return tensor

    def read() -> Tensor:
        values = tensor.read().to(dtype)
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():  # no copy of a large tensor
            raise ModelError(f"{tensor.name}: passes the range of {dtype}: choose another dtype")
        return values

    return replace(tensor, dtype=dtype, read=read)


def write_tensor_file(path: Path, tensors: Sequence[LazyTensor]) -> None:
    """Leave the tensors in one safetensors file, one in memory at a time. Raises OSError."""
    # wide types first, so that every tensor starts at a multiple of its element's size
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    with path.open("wb") as stream:
        header = _header(ordered)
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for tensor in ordered:
            stream.write(_bytes_of(tensor))


def _header(tensors: Sequence[LazyTensor]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.n_bytes
        fields[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % _ALIGNMENT_BYTES)


def _bytes_of(tensor: LazyTensor) -> memoryview:
    values = tensor.read()
    assert values.shape == tensor.shape, f"{tensor.name}: read {tuple(values.shape)}"
    assert values.dtype == tensor.dtype, f"{tensor.name}: read {values.dtype}"
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
