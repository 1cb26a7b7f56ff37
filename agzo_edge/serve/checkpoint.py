"""A base model's files, looked at without loading it: configuration, shapes of its layers, weight files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agzo_edge.errors import AdapterError, ModelError, numbered
from agzo_edge.model.load import auto_class_for, refused_as_model
from agzo_edge.model.weights import base_weight_of, linear_layers
from agzo_edge.record.adapter import LowRankPair
from agzo_edge.record.strict_json import strict_object

CONFIG_NAME = "config.json"
TOKENIZER_NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class LinearShape:
    """What a linear layer's weight must look like for a pair to be added to it."""

    out_features: int
    in_features: int
    transposed: bool  # stored as (in, out): GPT-2's Conv1D

    @property
    def stored(self) -> tuple[int, int]:
        """The shape in the file."""
        shape = (self.out_features, self.in_features)
        return (self.in_features, self.out_features) if self.transposed else shape


@dataclass(frozen=True)
class BaseFiles:
    """A base model's directory and what its config.json says."""

    source: str  # as the user named it
    directory: Path
    fields: Mapping[str, Any]  # config.json as it stands
    config: Any  # the same as a transformers configuration, with its defaults


def open_base(source: str, *, with_weights: bool) -> BaseFiles:
    """The base model at `source`, a directory or a hub id; of the hub's files only those needed are fetched.

    Raises ModelError when there is none, or transformers does not know its configuration.
    """
    from transformers import AutoConfig

    directory = Path(source)
    if not directory.is_dir():
        directory = _downloaded(source, with_weights=with_weights)
    fields = _json_object(directory / CONFIG_NAME)
    with refused_as_model(source, f"{CONFIG_NAME} cannot be used"):
        config = AutoConfig.from_pretrained(directory)
    return BaseFiles(source, directory, fields, config)


def _downloaded(source: str, *, with_weights: bool) -> Path:
    """The hub's files in the local cache, fetched where they are missing."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", *TOKENIZER_NAMES] if with_weights else [CONFIG_NAME]
    # consolidated.* is Mistral's second copy of the weights; folders hold other formats
    unwanted = ["consolidated*", "*/*"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=unwanted))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: no such directory, and the hub gives no such model (name the base model's directory "
            f"with --model, or go online): {_first_line(error)}"
        ) from None


def linear_shapes(base: BaseFiles) -> dict[str, LinearShape]:
    """The linear layers that a pair can be added to, by module path in the transformers model.

    The model is built without memory for its weights. A head that shares the embeddings' weight is left out:
    a change to it would change the embeddings too.
    """
    with refused_as_model(base.source, "no causal language model"), torch.device("meta"):
        network = auto_class_for(base.config).from_config(base.config)
    tied_head = network.get_output_embeddings() if is_tied(base.config) else None
    shapes = {}
    for name, module in linear_layers(network).items():
        if module is not tied_head:
            weight = base_weight_of(module, name=name, dtype=torch.float32)
            shapes[name] = LinearShape(*weight.shape, transposed=type(module).__name__ == "Conv1D")
    return shapes


def is_tied(config: Any) -> bool:
    """Whether the head's weight is the embeddings'."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def refuse_misfits(pairs: Mapping[str, LowRankPair], shapes: Mapping[str, LinearShape], *, source: str) -> None:
    """Raise AdapterError, with every fault, unless each pair has its layer and its layer's shape."""
    faults = []
    for name, pair in pairs.items():
        if (shape := shapes.get(name)) is None:
            faults.append(f"{name}: the model has no such linear layer with a weight of its own")
            continue
        change, weight = (pair.b.shape[0], pair.a.shape[1]), (shape.out_features, shape.in_features)
        if change != weight:
            faults.append(f"{name}: the pair is {change}, the layer {weight}")
    if faults:
        raise AdapterError(f"the adapter does not fit {source}; was it trained on another model?\n" + numbered(faults))


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path.parent}: no {path.name}: this is no transformers checkpoint")
    try:
        return strict_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
