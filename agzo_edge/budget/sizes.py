"""A model's sizes: by config.json, and by its tensors' shapes where that leaves them to the defaults of its class."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from agzo_edge.budget.headers import StoredTensor
from agzo_edge.errors import ModelError
from agzo_edge.writers import is_beside_text, writes_to_residual

LARGEST_SIZE = 2**40  # no model's, and a product of such sizes can still be written down
USUAL_HEAD = 128  # features: of Llama's and Mistral's classes, where neither config.json nor a norm tells it
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_HIDDEN = ("hidden_size", "n_embed", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
_IN_BLOCK = re.compile(r"(?:^|\.)([0-9]{1,9})\.")
_IN_ATTENTION = re.compile(r"(?<!linear_)(?:attn|attention)\.\w+$")


class Sizes(NamedTuple):
    """What the shapes of a model's layers follow from."""

    vocab_size: int
    hidden_size: int
    n_layers: int


class AttentionSizes(NamedTuple):
    """The widths of attention; of layers that differ the widest."""

    n_heads: int
    query_width: int  # features of all query heads together
    kv_width: int  # of all key heads


def is_size(value: object) -> TypeGuard[int]:
    """Whether a value of config.json is a number that a size can be."""
    return type(value) is int and 0 < value <= LARGEST_SIZE


def block_number(name: str) -> int | None:
    """The number of the block that the tensor or layer of this path is in; None outside the blocks."""
    found = _IN_BLOCK.search(name)
    return None if found is None else int(found[1])


def layers_in(tensors: Mapping[str, StoredTensor]) -> int:
    """The blocks that the weights have, by the highest number among those that text meets."""
    numbers = (block_number(name) for name in tensors if not is_beside_text(name))
    return 1 + max((number for number in numbers if number is not None), default=-1)


def sizes_of(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], *, source: str) -> Sizes:
    """The sizes of a model. Raises ModelError for what is no size, and where nothing tells one."""
    tables = (tensor.shape for name, tensor in tensors.items() if _is_embedding(name) and len(tensor.shape) == 2)
    rows, columns = next(tables, (None, None))
    return Sizes(
        vocab_size=_size(config, source, "vocab_size", by_tensors=rows),
        hidden_size=_size(config, source, *_HIDDEN, by_tensors=columns),
        n_layers=_size(config, source, *_LAYERS, by_tensors=layers_in(tensors)),
    )


def attention_sizes(
    config: Mapping[str, Any],
    linears: Mapping[str, tuple[int, int]],  # (out_features, in_features)
    tensors: Mapping[str, StoredTensor],
    *,
    source: str,
    hidden: int,
) -> AttentionSizes:
    """The sizes of attention. Raises ModelError for what is no size.

    Keys and values that come out of a latent (DeepSeek's) have as many heads as the queries, and are as wide.
    """
    writers = [inp for name, (_, inp) in linears.items() if _IN_ATTENTION.search(name) and writes_to_residual(name)]
    written = max(writers, default=hidden)
    head_dim = _size(config, source, "head_dim", by_tensors=_normed_width(tensors, below=written) or USUAL_HEAD)
    n_heads = _size(config, source, *_HEADS, by_tensors=max(1, written // head_dim))
    n_kv_heads = _size(config, source, "num_key_value_heads", by_tensors=n_heads)
    if not config.get("head_dim"):
        head_dim = max(1, written // n_heads)
    query_width = written if writers else n_heads * head_dim
    kv_width = _widest(linears, "k_proj") or n_kv_heads * head_dim
    if _widest(linears, "kv_b_proj"):
        query_width = kv_width = max(query_width, _widest(linears, "q_b_proj") or _widest(linears, "q_proj"))
    return AttentionSizes(n_heads, query_width, kv_width)


def _size(config: Mapping[str, Any], source: str, *names: str, by_tensors: int | None) -> int:
    """The first of `names` that config.json gives, null and 0 leaving it to the class; else what tensors tell.

    Raises ModelError for what is given and is no size, and where nothing tells one.
    """
    value = next((config[name] for name in names if config.get(name) not in (None, 0)), by_tensors)
    if not is_size(value):
        raise ModelError(
            f"{source}: not a causal language model: config.json gives {' or '.join(names)} as {repr(value)[:40]}"
        )
    return value


def _is_embedding(name: str) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS and not is_beside_text(name)


def _normed_width(tensors: Mapping[str, StoredTensor], *, below: int) -> int | None:
    """The length of the queries' norm where each head has its own, and not all of them one."""
    lengths = (t.shape[0] for name, t in tensors.items() if name.endswith(".q_norm.weight") and len(t.shape) == 1)
    return next((length for length in lengths if 0 < length < below), None)


def _widest(linears: Mapping[str, tuple[int, int]], leaf: str) -> int:
    """The most outputs of a layer with this last part of its name; 0 where there is none."""
    return max((out for name, (out, _) in linears.items() if name.rpartition(".")[2] == leaf), default=0)
