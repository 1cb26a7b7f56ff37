"""Models of real sizes with random weights, built on the device layer by layer: nothing is downloaded."""

import gc
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from agzo_edge.budget.facts import ModelFacts, facts_of
from agzo_edge.budget.headers import Checkpoint, StoredTensor
from agzo_edge.config import RunConfig, config_from
from agzo_edge.model.device import chosen_device, chosen_dtype
from agzo_edge.model.load import edge_model
from agzo_edge.model.runtime import EdgeModel

_STD = 0.02  # of a weight, as models are initialized
_ROW_SHIFT = 61  # of a row of weights against the one before it, within the one buffer


@dataclass(frozen=True)
class Setting:
    """Where the benchmark runs, how large it may be, and until when."""

    device: torch.device
    small: bool
    ends_s: float  # of perf_counter: no measurement is begun later

    @property
    def has_time(self) -> bool:
        """Whether another measurement may begin."""
        return perf_counter() < self.ends_s

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA device."""
        return self.device.type == "cuda"

    def config(self, **settings: Any) -> RunConfig:
        """A run on this device."""
        return config_from({"device": self.device.type, "threads": 1 if self.small else 0} | settings)

    def dtypes(self) -> list[str]:
        """The compute dtypes worth comparing here."""
        return ["float32", "bfloat16", "float16"]

    def free(self) -> None:
        """Give the device's unused memory back, so that the next subject begins alone."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def shapes() -> dict[str, PretrainedConfig]:
    """The published sizes of the models that people take, and one that is small enough for a test.

    Written down from their config.json; with embeddings and head they have 0.60, 1.72, 4.02, 8.19, 8.03, 14.77 and
    70.55 billion parameters, as their publishers say.
    """
    qwen: dict[str, Any] = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
    tied: dict[str, Any] = qwen | {"tie_word_embeddings": True}
    untied: dict[str, Any] = qwen | {"tie_word_embeddings": False}
    llama: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False}
    return {
        "tiny": LlamaConfig(**_sizes(128, 352, 2, 2), vocab_size=256, num_key_value_heads=1, tie_word_embeddings=False),
        "qwen3-0.6b": Qwen3Config(**_sizes(1024, 3072, 28, 16), **tied),
        "qwen3-1.7b": Qwen3Config(**_sizes(2048, 6144, 28, 16), **tied),
        "qwen3-4b": Qwen3Config(**_sizes(2560, 9728, 36, 32), **tied),
        "qwen3-8b": Qwen3Config(**_sizes(4096, 12_288, 36, 32), **untied),
        "llama-3.1-8b": LlamaConfig(**_sizes(4096, 14_336, 32, 32), **llama),
        "qwen3-14b": Qwen3Config(**_sizes(5120, 17_408, 40, 40), **untied),
        "llama-3.1-70b": LlamaConfig(**_sizes(8192, 28_672, 80, 64), **llama),
    }


def _sizes(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return dict(zip(names, (hidden, mlp, layers, heads, 131_072), strict=True))


def empty_network(shape: str) -> Any:
    """The transformers model of this shape without weights; its buffers are real."""
    config = shapes()[shape]
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def facts_of_shape(shape: str) -> ModelFacts:
    """What a plan must know of this shape, as from its checkpoint in bfloat16."""
    network = empty_network(shape)
    tensors = {
        name: StoredTensor(tuple(parameter.shape), "BF16", 2 * parameter.numel())
        for name, parameter in network.named_parameters()
    }
    return facts_of(Checkpoint(shape, network.config.to_dict(), tensors, true_shapes={}))


def random_network(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model of this shape, whose weights take no memory of their own until they are copied.

    The rows of a weight are windows on one short random buffer, each shifted against the one before: neither time nor
    memory minds. Embeddings and head, which are not quantized, are real.
    """
    network = empty_network(shape)
    head = network.get_output_embeddings()
    widest = max(max(parameter.shape) for parameter in network.parameters())
    generator = torch.Generator().manual_seed(0)
    buffer = (torch.randn((_ROW_SHIFT + 1) * widest, generator=generator) * _STD).to(device, dtype)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = _window(buffer, parameter.shape)
            if module is head or isinstance(module, nn.Embedding):
                weight = weight.contiguous()
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    network.tie_weights()
    for tensor in network.buffers():
        tensor.data = tensor.data.to(device)
    return network


def _window(buffer: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=buffer.dtype, device=buffer.device)  # a norm's
    return buffer.as_strided(shape, (_ROW_SHIFT, 1))


def random_model(shape: str, config: RunConfig) -> EdgeModel:
    """The model of this shape as a run with `config` would have loaded it."""
    device = chosen_device(config.device)
    network = random_network(shape, device, chosen_dtype(config.dtype, device))
    return edge_model(network, None, config, source=shape)
