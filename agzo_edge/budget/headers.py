"""What a checkpoint says about itself before any weight is read: config.json and safetensors headers.

A header is untrusted: its length, its offsets and the shard index are checked against the files.
Format: https://github.com/huggingface/safetensors#format (8 bytes of length, JSON, then the data).
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from agzo_edge.errors import ModelError, numbered

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_JSON_BYTES = 64 * 1024**2  # config.json and the shard index; the largest known index has 20 MB
MAX_DIMENSIONS = 64
MAX_QUANT_STATE_BYTES = 65_536  # a JSON of about 150 bytes
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
QUANT_STATE = ".quant_state.bitsandbytes__"

_BITS_PER_ENTRY = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class StoredTensor(NamedTuple):
    """A tensor as a header describes it."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "BF16", "U8"
    n_bytes: int

    @property
    def n_entries(self) -> int:
        """Entries as stored; a packed 4-bit weight has two weights in each."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's configuration and headers."""

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    true_shapes: Mapping[str, tuple[int, int]]  # (out, in) of 4-bit weights, where their quant_state was read


def read_checkpoint(directory: Path, *, source: str) -> Checkpoint:
    """The configuration and all headers in `directory`.

    Raises ModelError when a file is missing, broken, cut short, or points outside the directory.
    """
    config = read_json(directory / "config.json", source=source)
    tensors: dict[str, StoredTensor] = {}
    true_shapes: dict[str, tuple[int, int]] = {}
    faults = []
    for file in weight_files(directory, source=source):
        try:
            for name, tensor, start in _read_header(file):
                tensors[name] = tensor
                if QUANT_STATE in name:
                    true_shapes[name.split(QUANT_STATE)[0]] = _true_shape(file, start, tensor.n_bytes)
        except (OSError, ValueError, RecursionError) as error:
            faults.append(f"{file.name}: {error}")
    if faults:
        raise ModelError(f"{source}: broken checkpoint; download it again:\n{numbered(faults)}")
    return Checkpoint(source, config, tensors, true_shapes)


def read_json(file: Path, *, source: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises ModelError when there is none."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{source}: {file.name} has more than {MAX_JSON_BYTES} bytes: not what it claims to be")
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{source}: no {file.name} in it: is it the directory of a model?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{source}: {file.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{source}: {file.name} holds no JSON object")
    return value


def weight_files(directory: Path, *, source: str) -> list[Path]:
    """The safetensors files of a checkpoint, in the order transformers looks for them.

    Raises ModelError when there is none, a shard is missing, or the index leads out of the directory.
    """
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).exists():
        index = read_json(directory / INDEX_FILE, source=source)
        names = shard_names(index, source)
        if missing := [f"{name}: missing" for name in names if not (directory / name).is_file()]:
            raise ModelError(f"{source}: broken checkpoint; download it again:\n{numbered(missing)}")
        return [directory / name for name in names]
    others = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLED)
    if others:
        raise ModelError(
            f"{source}: holds {', '.join(others[:3])} and no {SINGLE_FILE}: only safetensors is read, since "
            "the other formats can run code. Save it again with transformers' save_pretrained"
        )
    raise ModelError(f"{source}: no {SINGLE_FILE} and no {INDEX_FILE} in it: only safetensors is read")


def shard_names(index: Mapping[str, Any], source: str) -> list[str]:
    """The shards that an index names. Raises ModelError when one lies outside the checkpoint's directory."""
    weight_map = index.get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(file, str) for file in files):
        raise ModelError(f"{source}: {INDEX_FILE} has no weight_map from tensors to files")
    names = sorted(set(files))
    if outside := [name for name in names if not _stays_inside(name)]:
        raise ModelError(
            f"{source}: {INDEX_FILE} points outside its directory: {', '.join(map(repr, outside[:3]))}. "
            "Do not use this checkpoint"
        )
    return names


def _stays_inside(name: str) -> bool:
    """Whether `name` is a relative path without "..", on any system.

    Symbolic links are followed: the hub's cache is made of them.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    rooted = posix.is_absolute() or bool(windows.anchor)
    return bool(name) and "\0" not in name and not rooted and ".." not in (*posix.parts, *windows.parts)


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor, int]]:
    """Each tensor of a safetensors file, with the place of its data from the file's start.

    Raises ValueError when the header does not describe this file.
    """
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise ValueError(f"has {file_bytes} bytes: no safetensors file")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"claims a header of {header_bytes} bytes in a file of {file_bytes}")
        header = json.loads(stream.read(header_bytes))
    if not isinstance(header, dict):
        raise ValueError("its header holds no JSON object")
    data_start = 8 + header_bytes
    for name, entry in header.items():
        if name != "__metadata__":
            tensor, begin = _checked_entry(name, entry, data_bytes=file_bytes - data_start)
            yield name, tensor, data_start + begin


def _checked_entry(name: str, entry: Any, *, data_bytes: int) -> tuple[StoredTensor, int]:
    """The tensor of a header's entry and where its data begins. Raises ValueError for a contradiction."""
    try:
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        bits = _BITS_PER_ENTRY[entry["dtype"]]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"tensor {name!r} is not described in full ({error})") from None
    # without a bound, a megabyte of digits takes minutes to multiply
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has a size or a place that is no natural number")
    n_bytes = -(-math.prod(shape) * bits // 8)
    if end - begin != n_bytes:
        raise ValueError(f"tensor {name!r} {list(shape)} needs {n_bytes} bytes and is given {end - begin}")
    if end > data_bytes:
        raise ValueError(f"is cut short: tensor {name!r} ends at byte {end} of {data_bytes}")
    return StoredTensor(shape, entry["dtype"], n_bytes), begin


def _true_shape(file: Path, start: int, n_bytes: int) -> tuple[int, int]:
    """The (out, in) that bitsandbytes wrote beside a packed 4-bit weight; ValueError for anything else."""
    if n_bytes > MAX_QUANT_STATE_BYTES:
        raise ValueError(f"a quant_state of {n_bytes} bytes: not what it claims to be")
    with file.open("rb") as stream:
        stream.seek(start)
        state = json.loads(stream.read(n_bytes))
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"a quant_state without a shape of two numbers: {shape!r}")
    return shape[0], shape[1]
