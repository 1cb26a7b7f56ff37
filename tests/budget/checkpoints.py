"""Tiny checkpoints for the tests of this folder, written with the safetensors format and nothing else."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agzo_edge.budget.facts import ModelFacts, facts_of
from agzo_edge.budget.headers import Checkpoint, StoredTensor

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def llama_shapes(config: Mapping[str, Any] = LLAMA) -> dict[str, tuple[int, ...]]:
    """The tensors of an untied Llama by name."""
    h, m, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, h),
        "lm_head.weight": (vocab, h),
    }
    layers = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
    layers |= {
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (m, h),
        "mlp.up_proj": (m, h),
        "mlp.down_proj": (h, m),
    }
    for block in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{block}.{name}.weight": shape for name, shape in layers.items()}
        shapes[f"model.layers.{block}.input_layernorm.weight"] = (h,)
    return shapes


def llama_facts(**changes: Any) -> ModelFacts:
    """The facts of a Llama without files."""
    config = LLAMA | changes
    return facts_by_headers(config, llama_shapes(config))


def facts_by_headers(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelFacts:
    """The facts of a bfloat16 model with these tensors, without files."""
    tensors = {name: StoredTensor(shape, "BF16", 2 * math.prod(shape)) for name, shape in shapes.items()}
    return facts_of(Checkpoint("a-model", config, tensors, true_shapes={}))


def write_safetensors(file: Path, entries: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file from name -> (dtype, shape, data)."""
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_llama(folder: Path, *, config: Mapping[str, Any] = LLAMA) -> Path:
    """A tiny bfloat16 Llama of zeros in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries = {}
    for name, shape in llama_shapes().items():
        n_entries = shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = ("BF16", shape, bytes(2 * n_entries))
    write_safetensors(folder / "model.safetensors", entries)
    return folder
