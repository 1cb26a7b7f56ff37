"""A quantized model as the tensors of a plain one: a checkpoint that bitsandbytes saved, or a trained model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agzo_edge.budget.headers import SINGLE_FILE
from agzo_edge.config import config_from
from agzo_edge.errors import ModelError
from agzo_edge.model.linear import FrozenLinear
from agzo_edge.model.load import load_model
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.serve.checkpoint import CONFIG_NAME, BaseFiles, is_tied
from agzo_edge.serve.staging import staged
from agzo_edge.serve.tensor_file import FLOATS, LazyTensor, stored_as, write_tensor_file


def original_dtype(base: BaseFiles, quantization: Mapping[str, Any]) -> str:
    """The type that the checkpoint was quantized from, or float32 where it does not say.

    Raises ModelError for a checkpoint that another method quantized.
    """
    if (method := quantization.get("quant_method", "bitsandbytes")) != "bitsandbytes":
        raise ModelError(
            f"{base.source}: is quantized by {method}, and only bitsandbytes can be merged: "
            "name the original checkpoint in 16 or 32 bit with --model"
        )
    told = base.fields.get("dtype") or base.fields.get("torch_dtype")
    return str(told) if told in FLOATS else "float32"


def dequantized_tensors(base: BaseFiles) -> list[LazyTensor]:
    """Every weight in float32 under the names of the transformers model.

    The model is held quantized, in the checkpoint's own bits; a layer is dequantized when its tensor is read.
    """
    settings = config_from({"device": "cpu", "dtype": "float32", "guide": "none"})
    return model_tensors(load_model(str(base.directory), settings, trains=False))


def model_tensors(model: EdgeModel) -> list[LazyTensor]:
    """Every weight of a loaded model, with all that it has learned, under the names of the transformers model.

    Linear layers that have learned something are in float32, and all are made when they are read; the others are as
    the model holds them.
    """
    network = model.network
    head = network.get_output_embeddings()
    tied = is_tied(network.config)
    tensors = [_held(name, values) for name, values in network.state_dict().items()]
    for name, module in network.named_modules():
        if isinstance(module, FrozenLinear) and not (tied and module is head):
            transposed = model.transposed and module is not head
            tensors += _of_layer(name, module, dtype=model.dtype, transposed=transposed)
    return tensors


def save_dense_model(model: EdgeModel, directory: Path) -> None:
    """Leave the model, with all that it has learned, as a plain checkpoint in its compute dtype.

    Raises ConfigError when `directory` is occupied, ModelError when a weight passes the dtype's range, and
    AgzoError when the disk refuses.
    """
    fields = model.network.config.to_dict()
    fields.pop("quantization_config", None)
    dtype = str(model.dtype).removeprefix("torch.")
    with staged(directory) as folder:
        tensors = [stored_as(tensor, model.dtype) for tensor in model_tensors(model)]
        write_tensor_file(folder / SINGLE_FILE, tensors)
        (folder / CONFIG_NAME).write_text(json.dumps(fields | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
        model.network.generation_config.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)


def _of_layer(name: str, layer: FrozenLinear, *, dtype: torch.dtype, transposed: bool) -> Iterator[LazyTensor]:
    branch = getattr(layer, "branch", None)
    learned = branch.learned() if branch is not None and not branch.is_untouched else None

    def read() -> Tensor:
        weight = layer.base.dense()
        if learned is not None:
            weight = weight.float() + learned.dense()
        return weight.mT if transposed else weight

    shape = layer.base.shape[::-1] if transposed else layer.base.shape
    yield LazyTensor(f"{name}.weight", shape, dtype if learned is None else torch.float32, read)
    if isinstance(layer.bias, Tensor):
        yield _held(f"{name}.bias", layer.bias)


def _held(name: str, values: Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(values.shape), values.dtype, lambda: values)
