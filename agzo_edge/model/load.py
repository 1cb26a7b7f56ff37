"""Loading a checkpoint through transformers, and putting our layers in the place of its own."""

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from agzo_edge.config import RunConfig
from agzo_edge.errors import ModelError, numbered
from agzo_edge.model.device import chosen_device, chosen_dtype, use_threads
from agzo_edge.model.linear import BranchedLinear, FrozenLinear
from agzo_edge.model.passes import PassContext
from agzo_edge.model.runtime import EdgeModel, attach_branches
from agzo_edge.model.weights import HeldWeight, base_weight_of, is_linear


def load_model(source: str, config: RunConfig) -> EdgeModel:
    """The model at `source`, a directory or a hub id, quantized as `config` says, with branches attached.

    Raises ModelError when there is no such model, it is no causal language model, it needs code of its own,
    its file is not safetensors, or it holds layers that cannot be adapted.
    """
    device = chosen_device(config.device)
    dtype = chosen_dtype(config.dtype, device)
    tokenizer = load_tokenizer(source, config)
    network = _pretrained(source, config, device=device, dtype=dtype)
    _refuse_fused_experts(network, source, config)
    context = PassContext(power_iterations=config.power_iterations, relative=config.relative)
    targets = target_names(network, config.target_modules, source=source)
    layers = {name: module for name, module in network.named_modules() if is_linear(module)}
    transposed = any(
        "Conv1D" in (type(m).__name__, getattr(m, "source_cls", nn.Linear).__name__) for m in layers.values()
    )
    for name, module in layers.items():
        network.set_submodule(name, _replacement(module, name, name in targets, context, config, dtype))
    network.requires_grad_(False).eval()
    model = EdgeModel(network, tokenizer, device, dtype, context, source, branches=[], transposed=transposed)
    use_threads(config.threads, n_parameters=sum(b.out_features * b.in_features for b in frozen_layers(network)))
    attach_branches(model, rank=config.rank)
    return model


def frozen_layers(network: nn.Module) -> list[FrozenLinear]:
    """Our linear layers in the network."""
    return [module for module in network.modules() if isinstance(module, FrozenLinear)]


def load_tokenizer(source: str, config: RunConfig) -> Any:
    """The tokenizer at `source`. Raises ModelError when it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{source}: no tokenizer can be read: {_reason(error)}") from None


def _pretrained(source: str, config: RunConfig, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model, quantized while its weights are read."""
    from transformers import AutoModelForCausalLM

    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    try:
        quantization = quantization_of(source, config, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loaders warn about what is checked below
            network, info = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                device_map={"": str(device)},
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                # given as None it would hide what the checkpoint says
                **({"quantization_config": quantization} if quantization else {}),
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source}: cannot be loaded: {_reason(error)}") from None
    _refuse_incomplete(info, source)
    return network


def _refuse_incomplete(info: Any, source: str) -> None:
    """Raise ModelError for weights that the checkpoint lacks: the loader has made random ones up."""
    faults = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    faults += [
        f"{name}: {tuple(stored)} in the file, {tuple(wanted)} by config.json"
        for name, stored, wanted in sorted(info["mismatched_keys"])
    ]
    if faults:
        raise ModelError(f"{source}: is no whole causal language model:\n{numbered(faults)}")


def quantization_of(source: str, config: RunConfig, dtype: torch.dtype) -> Any:
    """The bitsandbytes configuration that `config` asks for; None keeps what the checkpoint says.

    Raises ModelError for a checkpoint quantized by something else.
    """
    from transformers import AutoConfig, BitsAndBytesConfig

    stored = getattr(
        AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code),
        "quantization_config",
        None,
    )
    if stored is not None:
        method = stored["quant_method"] if isinstance(stored, dict) else stored.quant_method
        if method != "bitsandbytes":
            raise ModelError(f"{source}: is quantized by {method}; only bitsandbytes can be read")
        return None
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quant_type,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def target_names(network: Any, wanted: Sequence[str] | None, *, source: str) -> set[str]:
    """The linear layers to train: those whose path ends in one of `wanted`, or all but the head.

    Raises ModelError naming each entry of `wanted` that matches nothing.
    """
    head = network.get_output_embeddings()
    names = [name for name, module in network.named_modules() if is_linear(module) and module is not head]
    if not wanted:
        return set(names)
    matches = {w: {name for name in names if name == w or name.endswith(f".{w}")} for w in wanted}
    if missing := [w for w, found in matches.items() if not found]:
        kinds = sorted({re.sub(r".*\.", "", name) for name in names})
        raise ModelError(f"{source}: no linear layer matches {', '.join(missing)}; there are {', '.join(kinds)}")
    return set().union(*matches.values())


def _replacement(
    module: nn.Module, name: str, is_target: bool, context: PassContext, config: RunConfig, dtype: torch.dtype
) -> FrozenLinear:
    """Our layer for `module`: with a branch when it is a target."""
    weight = base_weight_of(module, name=name, dtype=dtype)
    if is_target and config.target == "dequantized":
        weight = HeldWeight(weight, dtype=dtype)
    bias: Any = module.bias
    bias = None if bias is None else bias.data
    return BranchedLinear(weight, bias, context=context) if is_target else FrozenLinear(weight, bias)


def _refuse_fused_experts(network: nn.Module, source: str, config: RunConfig) -> None:
    """Raise ModelError for weights with three dimensions: experts fused into one tensor have no side-branch."""
    if config.target_modules:
        return
    faults = [
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in network.named_parameters()
        if parameter.ndim == 3 and min(parameter.shape) > 1
    ]
    if faults:
        raise ModelError(
            f"{source}: holds fused expert weights, which AGZO cannot adapt. Name the layers to train with "
            f"--target-modules (q_proj, v_proj, ...) to leave them frozen:\n{numbered(faults, shown=5)}"
        )


def _reason(error: Exception) -> str:
    """The first line of a loader's message, since the rest is advice for another program's users."""
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs Python code of its own, which is run only with --trust-remote-code"
    if "no file named model.safetensors" in text:
        return "it holds no safetensors file, and no other kind (.bin, .pt) is read"
    return text.strip().split("\n")[0] or type(error).__name__
