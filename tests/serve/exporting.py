"""Random adapters of tiny models, and what they make of their base."""

from pathlib import Path
from typing import Any

import torch
from helpers import VOCAB, reference
from torch import Tensor

from agzo_edge.record.adapter import LowRankPair, save_adapter

IDS = torch.arange(4, 28).reshape(2, 12) % VOCAB


def layers_of(network: Any) -> dict[str, Any]:
    """Every linear layer of a transformers model but the head."""
    kinds = ("Linear", "Conv1D")
    head = network.get_output_embeddings()
    named = network.named_modules()
    return {name: layer for name, layer in named if type(layer).__name__ in kinds and layer is not head}


def random_pairs(network: Any, *, seed: int = 0) -> dict[str, LowRankPair]:
    """A pair for each linear layer, of rank 2 or 3."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index, (name, layer) in enumerate(layers_of(network).items()):
        transposed = type(layer).__name__ == "Conv1D"
        out_features, in_features = layer.weight.shape[::-1] if transposed else layer.weight.shape
        rank = 2 + index % 2
        a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        pairs[name] = LowRankPair(a, 0.3 * torch.randn(out_features, rank, generator=generator))
    return pairs


def make_adapter(directory: Path, source: str, *, transposed: bool = False) -> dict[str, LowRankPair]:
    """An adapter of random pairs for the model at `source`, with files of a run around it."""
    pairs = random_pairs(reference(source))
    save_adapter(
        directory,
        pairs,
        base_model=source,
        transposed=transposed,
        card="# A card\n",
        extra_files={"tokenizer.json": b"{}", "journal.jsonl": b"{}\n", "bases/0.safetensors": b""},
    )
    return pairs


def add_(network: Any, pairs: dict[str, LowRankPair]) -> Any:
    """`network` with every b @ a added to its weight."""
    layers = layers_of(network)
    with torch.no_grad():
        for name, pair in pairs.items():
            change = pair.b @ pair.a
            layers[name].weight += change.T if type(layers[name]).__name__ == "Conv1D" else change
    return network


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits.float()


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
