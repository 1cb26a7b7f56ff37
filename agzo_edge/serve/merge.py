"""A full checkpoint with the adapter added to its weights, one tensor in memory at a time."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agzo_edge.budget.headers import INDEX_FILE, SINGLE_FILE, weight_files
from agzo_edge.errors import ModelError, numbered
from agzo_edge.record.adapter import LowRankPair
from agzo_edge.serve.checkpoint import (
    CONFIG_NAME,
    TOKENIZER_NAMES,
    BaseFiles,
    LinearShape,
    linear_shapes,
    refuse_misfits,
)
from agzo_edge.serve.dequantized import dequantized_tensors, original_dtype
from agzo_edge.serve.tensor_file import FLOATS, LazyTensor, lazy_tensors, stored_as, write_tensor_file

_SUMMANDS = (*FLOATS.values(), torch.float64)
_WRAPPERS = re.compile(r"^((model|language_model)\.)+")
_COPIED = ("generation_config.json", *TOKENIZER_NAMES)


@dataclass(frozen=True)
class Merge:
    """A merged checkpoint that is yet to be written."""

    base: BaseFiles
    shards: Mapping[str, Sequence[LazyTensor]]  # by file name
    dtype: str | None  # what every floating tensor is stored as; None keeps the checkpoint's


def planned_merge(base: BaseFiles, pairs: Mapping[str, LowRankPair], *, dtype: str | None) -> Merge:
    """The checkpoint with b @ a added to its layers, in float32 and rounded once; nothing is computed yet.

    A checkpoint in 16 or 32 bit is read from its own files. One saved by bitsandbytes is loaded as it is
    and dequantized layer by layer. Raises AdapterError when the adapter does not fit, ModelError when the
    weights cannot be read or are quantized in another way.
    """
    shapes = linear_shapes(base)
    refuse_misfits(pairs, shapes, source=base.source)
    shards: Mapping[str, Sequence[LazyTensor]]
    if quantization := base.fields.get("quantization_config"):
        dtype = dtype or original_dtype(base, quantization)
        shards = {SINGLE_FILE: dequantized_tensors(base)}
    else:
        shards = {path.name: lazy_tensors(path) for path in _plain_files(base)}
    changes = _changes(base, pairs, shapes, [tensor for shard in shards.values() for tensor in shard])
    merged = {
        file: [_merged(tensor, changes.get(tensor.name), dtype) for tensor in shard] for file, shard in shards.items()
    }
    return Merge(base, merged, dtype)


def _plain_files(base: BaseFiles) -> list[Path]:
    """The base's weight files. Raises ModelError where one would not keep its name beside the others."""
    files = weight_files(base.directory, source=base.source)
    if odd := [path for path in files if path.parent != base.directory or path.suffix != ".safetensors"]:
        names = (str(path.relative_to(base.directory))[:200] for path in odd)
        faults = [f"{name!r}: no plain name of a safetensors file" for name in names]
        raise ModelError(f"{base.source}: these shards cannot be read:\n{numbered(faults)}")
    return files


def write_merge(directory: Path, merge: Merge) -> None:
    """Leave the merged checkpoint in `directory`, which exists and is empty.

    Raises OSError, and ModelError when a weight passes the range of its type.
    """
    for file, shard in merge.shards.items():
        write_tensor_file(directory / file, shard)
    if set(merge.shards) != {SINGLE_FILE}:
        _write_json(directory / INDEX_FILE, _index(merge.shards))
    _write_json(directory / CONFIG_NAME, _config_fields(merge))
    for name in _COPIED:
        if (file_path := merge.base.directory / name).is_file():
            shutil.copyfile(file_path, directory / name)


@dataclass(frozen=True)
class _Change:
    pair: LowRankPair
    transposed: bool

    def dense(self) -> Tensor:
        """The change in the layout of the stored weight, float32."""
        product = self.pair.b @ self.pair.a
        return product.mT if self.transposed else product


def _changes(
    base: BaseFiles,
    pairs: Mapping[str, LowRankPair],
    shapes: Mapping[str, LinearShape],
    tensors: Sequence[LazyTensor],
) -> dict[str, _Change]:
    """The change of each stored tensor, by its name in the file."""
    stored = {tensor.name: tensor for tensor in tensors}
    changes: dict[str, _Change] = {}
    faults = []
    for module, pair in pairs.items():
        names = _stored_names(f"{module}.weight", stored)
        if len(names) != 1 or names[0] in changes:
            faults.append(f"{module}: {len(names)} tensors may be its weight: it needs one of its own")
        elif fault := _misfit(stored[names[0]], shapes[module]):
            faults.append(fault)
        else:
            changes[names[0]] = _Change(pair, shapes[module].transposed)
    if faults:
        raise ModelError(f"{base.source}: the adapter cannot be merged into it:\n" + numbered(faults))
    return changes


def _misfit(tensor: LazyTensor, shape: LinearShape) -> str | None:
    """What keeps a pair of the layer from being added to the stored tensor."""
    if tensor.shape != shape.stored:
        return f"{tensor.name}: is {tensor.shape}, and {CONFIG_NAME} says {shape.stored}"
    if tensor.dtype not in _SUMMANDS:
        return f"{tensor.name}: is {tensor.dtype}, and nothing can be added but to floats of 16 bits or more"
    return None


def _stored_names(name: str, stored: Mapping[str, LazyTensor]) -> list[str]:
    """What `name` may be called in the file: itself, or a prefix less or more (GPT-2's "transformer.").

    Where none is, as Gemma 3's with images: what it is called beneath "model." and "language_model.", in any order.
    """
    if name in stored:
        return [name]
    related = [other for other in stored if name.endswith(f".{other}") or other.endswith(f".{name}")]
    return related or [other for other in stored if _beneath_wrappers(other) == _beneath_wrappers(name)]


def _beneath_wrappers(name: str) -> str:
    """A tensor's name without the names of the models around it."""
    return _WRAPPERS.sub("", name)


def _merged(tensor: LazyTensor, change: _Change | None, dtype: str | None) -> LazyTensor:
    """`tensor` plus its change, if any; summed in float32 or wider, and rounded once."""
    final = FLOATS[dtype] if dtype else tensor.dtype
    if change is None:
        return stored_as(tensor, final)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    summed = replace(tensor, dtype=wide, read=lambda: tensor.read().to(wide) + change.dense())
    return stored_as(summed, final)


def _config_fields(merge: Merge) -> dict[str, Any]:
    """config.json of the merged checkpoint."""
    fields = {name: value for name, value in merge.base.fields.items() if name != "quantization_config"}
    if merge.dtype:
        fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = merge.dtype
    return fields


def _index(shards: Mapping[str, Sequence[LazyTensor]]) -> dict[str, Any]:
    total_bytes = sum(tensor.n_bytes for shard in shards.values() for tensor in shard)
    weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
