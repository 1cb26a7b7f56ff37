"""An adapter as llama.cpp reads it: a GGUF file of lora_a and lora_b tensors under llama.cpp's names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from agzo_edge.errors import ModelError, UsageError, numbered
from agzo_edge.record.adapter import LowRankPair
from agzo_edge.serve.checkpoint import BaseFiles, linear_shapes, refuse_misfits

# transformers' model_type: llama.cpp's architecture. Those whose layers keep their names, shapes and order in
# llama.cpp's converter (conversion/{llama,qwen,gemma,phi}.py), apart from the rotation below.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
# llama.cpp rotates neighbouring pairs of a head for this one, transformers the head's two halves
_INTERLEAVED = "llama"


@dataclass(frozen=True)
class GgufLora:
    """An adapter in llama.cpp's names and order of rows, yet to be written."""

    architecture: str
    pairs: Mapping[str, LowRankPair]  # by tensor name in llama.cpp's model


def gguf_lora(base: BaseFiles, pairs: Mapping[str, LowRankPair]) -> GgufLora:
    """The adapter for llama.cpp's form of the checkpoint, of which only config.json is read.

    Raises UsageError without the gguf package, ModelError for an architecture that is not known to keep its
    layers there, AdapterError when the adapter does not fit.
    """
    gguf = _gguf_package()
    kind = base.config.model_type
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ModelError(
            f"{base.source}: is a {kind} model: gguf is written for {known}; use --to merged and "
            "llama.cpp's own converter"
        )
    refuse_misfits(pairs, linear_shapes(base), source=base.source)
    architecture = _ARCHITECTURES[kind]
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], base.config.num_hidden_layers)
    named = {module: names.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in pairs}
    if unknown := [module for module, name in named.items() if name is None]:
        raise ModelError(f"{base.source}: llama.cpp's {architecture} lacks these layers:\n" + numbered(unknown))
    if architecture == _INTERLEAVED:
        pairs = {module: _reordered(module, pair, base.config) for module, pair in pairs.items()}
    return GgufLora(architecture, {str(named[module]): pair for module, pair in pairs.items()})


def write_gguf(path: Path, lora: GgufLora, *, dtype: str) -> None:
    """Leave the adapter at `path`, its tensors in `dtype`.

    Raises OSError, and ModelError when a number passes the range of float16.
    """
    gguf = _gguf_package()
    # llama.cpp multiplies by alpha / rank with one alpha for all layers and each layer's own rank
    alpha = max(pair.rank for pair in lora.pairs.values())
    writer = gguf.GGUFWriter(path, lora.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, pair in lora.pairs.items():
            _add(gguf, writer, f"{name}.lora_a", pair.a, dtype)
            _add(gguf, writer, f"{name}.lora_b", pair.b * (pair.rank / alpha), dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _reordered(module: str, pair: LowRankPair, config: Any) -> LowRankPair:
    """The pair with the rows of b as llama.cpp's converter orders those of a query or key weight."""
    layer = module.rpartition(".")[2]
    if layer == "q_proj":
        return LowRankPair(pair.a, _interleaved(pair.b, config.num_attention_heads))
    if layer == "k_proj":
        return LowRankPair(pair.a, _interleaved(pair.b, config.num_key_value_heads))
    return pair


def _interleaved(
    b: Tensor,  # (n_heads * head_features, rank)
    n_heads: int,
) -> Tensor:  # (n_heads * head_features, rank)
    """The rows of every head with its second half dealt between the first: 0, n/2, 1, n/2 + 1, ..."""
    return b.reshape(n_heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _add(gguf: Any, writer: Any, name: str, values: Tensor, dtype: str) -> None:
    array = np.ascontiguousarray(values.numpy())
    if dtype == "bfloat16":
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        return
    if dtype == "float16":
        with np.errstate(over="ignore"):  # told in words below
            array = array.astype(np.float16)
    if not np.isfinite(array).all():
        raise ModelError(f"{name}: passes the range of float16: choose another dtype")
    writer.add_tensor(name, array)


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UsageError("writing gguf needs a package more: pip install gguf") from None
    return gguf
