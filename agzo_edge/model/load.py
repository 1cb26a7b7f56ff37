"""Loading a checkpoint through transformers, and putting our layers in the place of its own."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from agzo_edge.config import RunConfig
from agzo_edge.errors import ModelError, numbered
from agzo_edge.model.attention import choose_attention
from agzo_edge.model.device import chosen_device, chosen_dtype, use_threads
from agzo_edge.model.linear import BranchedLinear, FrozenLinear
from agzo_edge.model.memory import give_back, is_out_of_memory, return_what_is_freed
from agzo_edge.model.offload import place_embeddings, place_of, settle
from agzo_edge.model.passes import PassContext
from agzo_edge.model.pieces import let_mlps_work_in_pieces
from agzo_edge.model.runtime import EdgeModel, attach_branches, require_guidable
from agzo_edge.model.weights import DenseWeight, HeldWeight, base_weight_of, linear_layers, quantized, rehoused
from agzo_edge.model.workspace import Workspace
from agzo_edge.writers import ALL_LINEAR, is_beside_text, targets_among

# What broken or odd files of a model make its loaders raise; an assertion is theirs, not ours.
_LOADING_FAILED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError),
    *(AssertionError, ImportError, RuntimeError, SafetensorError),
)
_OF_A_TOKENIZER = re.compile(r"tok|vocab|merges|piece|\.model$")  # in the names of its files


def import_libraries() -> None:
    """Import what loading will, so that their memory is not taken for the model's."""
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    for name in ("transformers.modeling_utils", "bitsandbytes.functional"):
        import_module(name)


def load_model(source: str, config: RunConfig, *, trains: bool = True) -> EdgeModel:
    """The model at `source`, a directory or a hub id, quantized as `config` says, with branches attached.

    It will be trained, or only used. Raises ModelError when there is no such model, it is no causal language model, it
    needs code of its own, its file is not safetensors, or it holds layers that cannot be adapted.
    """
    import_libraries()
    return_what_is_freed()
    tokenizer = load_tokenizer(source, config)
    network = _pretrained(source, config, dtype=chosen_dtype(config.dtype, chosen_device(config.device)))
    if trains:
        _refuse_fused_experts(network, source, config)
    return edge_model(network, tokenizer, config, source=source)


def edge_model(network: Any, tokenizer: Any, config: RunConfig, *, source: str) -> EdgeModel:
    """A transformers network with our layers in the place of its own, which is used up.

    Raises ModelError when it holds layers that cannot be adapted.
    """
    device = chosen_device(config.device)
    dtype = chosen_dtype(config.dtype, device)
    context = PassContext(power_iterations=config.power_iterations, relative=config.relative)
    transposed = _replace_layers(network, source, config, context=context, device=device, dtype=dtype)
    give_back(device)  # quantizing leaves gaps, and the embeddings may be the most that is ever converted
    _place_the_rest(network, config, device=device, dtype=dtype)
    let_mlps_work_in_pieces(network, context)
    choose_attention(network, device=device, dtype=dtype)
    network.requires_grad_(False).eval()
    model = EdgeModel(network, tokenizer, device, dtype, context, source, branches=[], transposed=transposed)
    model.offloaded = config.offload
    settle(model, config)
    n_parameters = sum(layer.out_features * layer.in_features for layer in model.frozen_layers.values())
    use_threads(config.threads, n_parameters=n_parameters)
    attach_branches(model, rank=config.rank, guided=config.guide == "head")
    if config.guide == "head":
        require_guidable(model)
    give_back(device)
    return model


def _replace_layers(
    network: Any, source: str, config: RunConfig, *, context: PassContext, device: torch.device, dtype: torch.dtype
) -> bool:
    """Put our layers in the place of the network's, one by one; whether they are GPT-2's Conv1D.

    A layer is quantized when its turn comes: the weights still to come are in their files, not in memory.
    """
    targets = target_names(network, config.target_modules, source=source)
    head = network.get_output_embeddings()
    place = place_of(device, outside=config.offload == "layers")
    layers = linear_layers(network)
    workspace = Workspace()
    for name, module in layers.items():
        bias = None if module.bias is None else module.bias.data.to(device, dtype, copy=True)
        weight = base_weight_of(module, name=name, dtype=dtype, workspace=workspace)
        if module is head:  # dense always: it may be the embeddings, and is placed with them
            weight = weight if isinstance(weight, DenseWeight) else DenseWeight(weight.dense().clone())
        else:
            weight = quantized(weight, config, device=device, dtype=dtype, workspace=workspace)
            opened = name in targets and config.target == "dequantized"
            weight = HeldWeight(weight, dtype=dtype) if opened else rehoused(weight, place)
        layer = BranchedLinear(weight, bias, context=context) if name in targets else FrozenLinear(weight, bias)
        network.set_submodule(name, layer)
    return any("Conv1D" in (type(m).__name__, getattr(m, "source_cls", nn.Linear).__name__) for m in layers.values())


def _place_the_rest(network: Any, config: RunConfig, *, device: torch.device, dtype: torch.dtype) -> None:
    """Move embeddings, head and norms that text meets, and buffers, out of their files, in the compute dtype."""
    place_embeddings(network, place_of(device, outside=config.offload != "none", dtype=dtype))
    for name, module in network.named_modules():
        if not isinstance(module, nn.Embedding) and not is_beside_text(name):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device, dtype, copy=True)
    for buffer in network.buffers():
        buffer.data = buffer.data.to(device)


def load_tokenizer(source: str, config: RunConfig) -> Any:
    """The tokenizer at `source`. Raises ModelError when it has none that can be read."""
    from transformers import AutoTokenizer

    directory = Path(source)
    if directory.is_dir() and not any(_OF_A_TOKENIZER.search(path.name) for path in directory.iterdir()):
        raise ModelError(
            f"{source}: holds no tokenizer: copy tokenizer.json and tokenizer_config.json there from where the model is"
        )
    with refused_as_model(source, "no tokenizer can be read"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)


def _pretrained(source: str, config: RunConfig, *, dtype: torch.dtype) -> Any:
    """The transformers model as its files hold it: the weights are mapped, and take memory only when they are read."""
    from transformers import AutoConfig

    with refused_as_model(source, "cannot be loaded"), _quiet_loader():
        found = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        _refuse_other_quantization(found, source)
        network, info = auto_class_for(found).from_pretrained(
            source,
            dtype="auto",
            device_map={"": "cpu"},
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    _refuse_incomplete(info, source)
    _renew_buffers(network, dtype)
    return network


@contextmanager
def refused_as_model(source: str, what: str) -> Iterator[None]:
    """Inside, what a loader raises at broken or odd files is a ModelError; an allocation that fails stays one."""
    try:
        yield
    except StrictDataclassError as error:
        raise ModelError(f"{source}: config.json cannot be used: {_reason(error)}") from None
    except _LOADING_FAILED as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{source}: {what}: {_reason(error)}") from None


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Inside, transformers gives no warnings and shows no tables: what they tell of is checked afterwards."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _renew_buffers(network: Any, dtype: torch.dtype) -> None:
    """Compute the buffers that are in the checkpoint's dtype anew in ours: Gemma's scale of its embeddings."""
    from accelerate import init_empty_weights

    if network.dtype is dtype:
        return
    with init_empty_weights(include_buffers=False):
        fresh = dict(type(network)._from_config(network.config, dtype=dtype).named_buffers())
    for name, buffer in network.named_buffers():
        if name in fresh and buffer.dtype is network.dtype and buffer.is_floating_point():
            buffer.data = fresh[name].data


def _refuse_incomplete(info: Any, source: str) -> None:
    """Raise ModelError for weights that the checkpoint lacks: the loader has made random ones up."""
    faults = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    faults += [
        f"{name}: {tuple(stored)} in the file, {tuple(wanted)} by config.json"
        for name, stored, wanted in sorted(info["mismatched_keys"])
    ]
    if faults:
        raise ModelError(f"{source}: is no whole causal language model:\n{numbered(faults)}")


def _refuse_other_quantization(found: Any, source: str) -> None:
    """Raise ModelError for a configuration of a checkpoint that is quantized by something else than bitsandbytes."""
    stored = getattr(found, "quantization_config", None)
    if stored is not None:
        method = stored["quant_method"] if isinstance(stored, dict) else stored.quant_method
        if method != "bitsandbytes":
            raise ModelError(f"{source}: is quantized by {method}; only bitsandbytes can be read")


def auto_class_for(found: Any) -> Any:
    """The auto class of transformers for a configuration: that of images and text where there is none of text alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    of_text, of_images = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    known = type(found) in of_text or type(found) not in of_images
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def target_names(network: Any, wanted: Sequence[str] | None, *, source: str) -> set[str]:
    """The linear layers to train, as `targets_among` all but the head.

    Raises ModelError naming each entry of `wanted` that matches nothing.
    """
    head = network.get_output_embeddings()
    names = [name for name, module in linear_layers(network).items() if module is not head]
    chosen, missing = targets_among(names, wanted)
    if missing:
        kinds = sorted({re.sub(r".*\.", "", name) for name in names})
        raise ModelError(f"{source}: no linear layer matches {', '.join(missing)}; there are {', '.join(kinds)}")
    return chosen


def _refuse_fused_experts(network: nn.Module, source: str, config: RunConfig) -> None:
    """Raise ModelError for weights with three dimensions, such as experts fused into one: they have no side-branch."""
    if config.target_modules and ALL_LINEAR not in config.target_modules:
        return
    faults = [
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in network.named_parameters()
        if parameter.ndim == 3 and min(parameter.shape) > 1
    ]
    if faults:
        kinds = sorted({name.rpartition(".")[2] for name in linear_layers(network)})
        raise ModelError(
            f"{source}: holds weights of several layers in one, such as fused experts, which AGZO cannot adapt. Name "
            f"the layers to train with --target-modules to leave them frozen; there are {', '.join(kinds)}:\n"
            f"{numbered(faults, shown=5)}"
        )


def _reason(error: Exception) -> str:
    """The first line of a loader's message, since the rest is advice for another program's users."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs Python code of its own, which is run only with --trust-remote-code"
    if "no file named model.safetensors" in text:
        return "it holds no safetensors file, and no other kind (.bin, .pt) is read"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    said = " ".join(lines[:4] if lines and lines[0].endswith(":") else lines[:1])
    return said if said and not isinstance(error, KeyError) else f"{type(error).__name__} {said}".strip()
