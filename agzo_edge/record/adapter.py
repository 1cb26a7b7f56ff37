"""An adapter on disk: PEFT's layout for LoRA, one low-rank pair for each layer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from agzo_edge.errors import AdapterError, AgzoError, numbered
from agzo_edge.record.files import (
    discard_aside,
    inside,
    make_directory,
    put_in_place,
    sync_directory,
    write_aside,
    writing,
)
from agzo_edge.record.lora_config import LoraScaling, lora_config_text, lora_scaling
from agzo_edge.record.strict_json import strict_object
from agzo_edge.record.tensors import read_tensors
from agzo_edge.units import MIB

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
CARD_NAME = "README.md"
_MAX_CONFIG_BYTES = 16 * MIB
_MAX_MODULE_LENGTH = 256
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class LowRankPair:
    """The weight change b @ a of one layer, in PEFT's orientation: a LoRA whose scaling is 1."""

    a: Tensor  # (rank, in_features) float32
    b: Tensor  # (out_features, rank) float32

    @property
    def rank(self) -> int:
        """The number of rows of a and of columns of b."""
        return self.a.shape[0]


def save_adapter(
    directory: Path,
    pairs: Mapping[str, LowRankPair],  # by module path in the transformers model
    *,
    base_model: str,
    transposed: bool,  # the layers are GPT-2's Conv1D
    card: str,
    extra_files: Mapping[str, bytes] | None = None,  # name: content, a tokenizer say
) -> None:
    """Leave an adapter in `directory` that PEFT loads; a kill leaves the old one, the new one, or none.

    Everything is written and synced aside first, so that a full disk changes nothing. Then the weights get
    their name, the other files theirs, and the configuration, without which nothing loads, comes last.
    Raises AgzoError when it cannot be written or a pair holds a number that is not finite.
    """
    assert pairs, "an adapter without layers"
    extra = dict(extra_files or {})
    assert not extra.keys() & {WEIGHTS_NAME, CONFIG_NAME, CARD_NAME}, "an extra file has a taken name"
    stored = {module: _storable(pair) for module, pair in pairs.items()}
    _refuse_non_finite(stored, where=str(directory), kind=AgzoError)
    config = lora_config_text(
        {module: pair.rank for module, pair in stored.items()}, base_model=base_model, transposed=transposed
    )
    contents = {WEIGHTS_NAME: _weights_bytes(stored), CARD_NAME: card.encode("utf-8"), **extra}
    contents[CONFIG_NAME] = config.encode("utf-8")
    with writing(directory):
        make_directory(directory)
        _replace_all({inside(directory, name): data for name, data in contents.items()})


def load_adapter(directory: Path) -> Mapping[str, LowRankPair]:
    """The pairs of a plain PEFT LoRA, by module path in the transformers model; its scaling is folded into b.

    Raises AdapterError, with every fault, for what is more than a pair for each layer (DoRA, trained biases,
    embeddings, whole modules), for pickled weights, and for tensors that disagree or are not finite.
    """
    config, weights = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    _require_config(directory)
    if not weights.is_file():
        pickled = (directory / "adapter_model.bin").exists()
        hint = ": only safetensors is read, adapter_model.bin can run code" if pickled else ""
        raise AdapterError(f"{directory}: no {WEIGHTS_NAME}{hint}")
    if config.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{config} is larger than {_MAX_CONFIG_BYTES // MIB} MiB: this is no adapter's")
    scaling = lora_scaling(config.read_bytes(), where=str(config))
    pairs = _scaled_pairs(read_tensors(weights), scaling, where=str(weights))
    _refuse_non_finite(pairs, where=str(weights), kind=AdapterError)
    return pairs


def _require_config(directory: Path) -> None:
    """Raise AdapterError for a directory that holds no adapter."""
    if not directory.exists():
        raise AdapterError(f"{directory}: no such directory")
    if not (directory / CONFIG_NAME).is_file():
        raise AdapterError(f"{directory}: no {CONFIG_NAME}: no adapter, or its writing was cut short")


def base_model_of(directory: Path) -> str | None:
    """The base model that the adapter in `directory` names, if any. Raises AdapterError for no adapter."""
    path = directory / CONFIG_NAME
    _require_config(directory)
    try:
        name = strict_object(path.read_bytes()).get("base_model_name_or_path")
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    return name if isinstance(name, str) and name else None


def _replace_all(contents: Mapping[Path, bytes]) -> None:
    """Put every file in place, in order; the last one makes the others count."""
    paths = list(contents)
    config = paths[-1]
    try:
        for path, data in contents.items():
            make_directory(path.parent)
            write_aside(path, data)
        if config.exists() and config.read_bytes() != contents[config]:
            config.unlink()  # new weights must never meet an old configuration
            sync_directory(config.parent)
        for path in paths:
            put_in_place(path)
    finally:
        for path in paths:
            discard_aside(path)


def _storable(pair: LowRankPair) -> LowRankPair:
    """The pair as float32 on the CPU. Rank 0, which PEFT does not know, becomes rank 1 of zeros."""
    assert pair.a.dim() == pair.b.dim() == 2, "a pair's factors are matrices"
    assert pair.b.shape[1] == pair.rank, "a pair's factors differ in rank"
    a, b = (x.detach().to("cpu", torch.float32).contiguous() for x in (pair.a, pair.b))
    if pair.rank == 0:
        return LowRankPair(a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1))
    return LowRankPair(a, b)


def _weights_bytes(pairs: Mapping[str, LowRankPair]) -> bytes:
    """The safetensors file. It is whole in memory once: 168 MB for rank 16 on all layers of an 8B model."""
    tensors: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        # layers with the same input share their basis, and safetensors refuses shared memory
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a.clone()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _scaled_pairs(tensors: Mapping[str, Tensor], scaling: LoraScaling, *, where: str) -> dict[str, LowRankPair]:
    """The tensors two by two, b multiplied by its scaling."""
    sides: dict[str, dict[str, Tensor]] = {}
    faults = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or len(match["module"]) > _MAX_MODULE_LENGTH:
            faults.append(f"{key[:200]!r}: only lora_A and lora_B weights of linear layers can be read")
        else:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, pair in sides.items():
        faults.extend(f"{module}: {fault}" for fault in _pair_faults(pair, rank=scaling.rank_of(module)))
    if not sides:
        faults.append("there is no LoRA weight in it")
    if faults:
        raise AdapterError(f"{where}: this adapter cannot be used:\n" + numbered(faults))
    return {
        module: LowRankPair(pair["A"].float(), pair["B"].float() * scaling.scaling_of(module))
        for module, pair in sides.items()
    }


def _pair_faults(pair: Mapping[str, Tensor], *, rank: int) -> list[str]:
    """What keeps the two tensors from being a pair of this rank."""
    if missing := {"A", "B"} - pair.keys():
        return [f"lora_{missing.pop()} is missing"]
    shapes = f"lora_A is {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)}"
    if pair["A"].dim() != 2 or pair["B"].dim() != 2:
        return [f"{shapes}: not the matrices of a linear layer"]
    if not pair["A"].shape[0] == pair["B"].shape[1] == rank:
        return [f"{shapes}, and the configuration says rank {rank}"]
    types = {str(tensor.dtype) for tensor in pair.values() if tensor.dtype not in _FLOATS}
    return [f"the tensors are {', '.join(sorted(types))}: 16- or 32-bit floats are read"] if types else []


def _refuse_non_finite(pairs: Mapping[str, LowRankPair], *, where: str, kind: type[AgzoError]) -> None:
    bad = [name for name, pair in pairs.items() if not (pair.a.isfinite().all() and pair.b.isfinite().all())]
    if bad:
        raise kind(f"{where}: NaN or infinite weights in {len(bad)} layers:\n" + numbered(bad))
