"""Tensors on disk: safetensors, read as if somebody else had written it.

Files of which every bit counts (bases, the learner's state) carry a checksum in their metadata, "crc32": the
CRC-32 of each tensor's name, dtype, shape and bytes, in the order of the names, 8 hex digits.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agzo_edge.errors import AdapterError

CHECKSUM_KEY = "crc32"  # the only metadata: with several their order would differ from run to run
# what safe_open and torch raise for headers that contradict themselves, the file, or the memory there is
_UNSOUND = (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, OverflowError)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, copied; safetensors checks each length and offset against the file's size.

    Raises AdapterError when the file is missing or is no sound safetensors file.
    """
    return _read(path)[0]


def checked_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of contiguous `tensors` on the CPU, with their checksum."""
    return safetensors.torch.save(dict(tensors), metadata={CHECKSUM_KEY: _checksum(tensors)})


def read_checked(path: Path) -> dict[str, Tensor]:
    """The tensors that `checked_bytes` was given. Raises AdapterError for anything else."""
    tensors, checksum = _read(path)
    if checksum != _checksum(tensors):
        raise AdapterError(f"{path}: is damaged: its checksum is not that of its tensors; restore it from a copy")
    return tensors


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and the checksum if there is one."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
            return tensors, (file.metadata() or {}).get(CHECKSUM_KEY)
    except _UNSOUND as error:
        raise AdapterError(f"{path}: cannot be read as safetensors: {error}") from None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode("utf-8", "surrogatepass")
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(about, checksum))
    return f"{checksum:08x}"
