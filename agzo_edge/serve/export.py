"""Taking an adapter elsewhere: a clean PEFT directory, a merged checkpoint, a LoRA for llama.cpp."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agzo_edge.errors import ConfigError, ModelError, numbered
from agzo_edge.paths import expanded, lasting
from agzo_edge.record.adapter import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    LowRankPair,
    load_adapter,
    save_adapter,
)
from agzo_edge.record.card import model_card
from agzo_edge.record.strict_json import strict_object
from agzo_edge.serve.checkpoint import TOKENIZER_NAMES, BaseFiles, open_base
from agzo_edge.serve.gguf_lora import gguf_lora, write_gguf
from agzo_edge.serve.merge import planned_merge, write_merge
from agzo_edge.serve.staging import refuse_occupied, staged
from agzo_edge.serve.tensor_file import FLOATS, lazy_tensors, stored_as, write_tensor_file

FORMATS = ("peft", "merged", "gguf")
GGUF_NAME = "adapter.gguf"


def export_adapter(
    adapter: Path,
    *,
    to: str,  # one of FORMATS
    output: Path,
    model_source: str | None = None,
    dtype: str | None = None,
) -> Path:
    """`output`, filled: a directory that must be absent or empty, and is whole or not there.

    `model_source` is the base model's directory or hub id, by default the one that the adapter names; it is
    read for merged, and for gguf its config.json. `dtype`, one of FLOATS, is what the tensors are stored as:
    float32 by default, and for merged what the base model is stored as.
    Raises ConfigError for a wrong request, AdapterError or ModelError for what cannot be read or does not fit
    together, AgzoError when the disk refuses.
    """
    _refuse_wrong_request(to, output, dtype)
    pairs = load_adapter(adapter)
    facts = strict_object((adapter / CONFIG_NAME).read_bytes())
    if to == "peft":
        with staged(output) as directory:
            _write_peft(directory, adapter, pairs, facts, base_model=model_source, dtype=dtype or "float32")
    elif to == "merged":
        merge = planned_merge(_base(adapter, facts, model_source, with_weights=True), pairs, dtype=dtype)
        with staged(output) as directory:
            write_merge(directory, merge)
    else:
        lora = gguf_lora(_base(adapter, facts, model_source, with_weights=False), pairs)
        with staged(output) as directory:
            write_gguf(directory / GGUF_NAME, lora, dtype=dtype or "float32")
    return output


def _refuse_wrong_request(to: str, output: Path, dtype: str | None) -> None:
    faults = []
    if to not in FORMATS:
        faults.append(f"to is {to!r}: choose one of {', '.join(FORMATS)}, replay")
    if dtype is not None and dtype not in FLOATS:
        faults.append(f"dtype is {dtype!r}: choose one of {', '.join(FLOATS)}")
    if output.suffix == ".gguf":
        faults.append(f"output is {output}: name a directory, {GGUF_NAME} is written into it")
    if faults:
        raise ConfigError("the adapter cannot be exported:\n" + numbered(faults))
    refuse_occupied(output)


def _base(adapter: Path, facts: Mapping[str, Any], source: str | None, *, with_weights: bool) -> BaseFiles:
    """The base model that the user names, or else the adapter."""
    source = source or facts.get("base_model_name_or_path")
    if not source:
        raise ModelError(f"{adapter}: names no base model: give its directory or hub id with --model")
    return open_base(expanded(str(source)), with_weights=with_weights)


def _write_peft(
    directory: Path,
    adapter: Path,
    pairs: Mapping[str, LowRankPair],
    facts: Mapping[str, Any],  # adapter_config.json
    *,
    base_model: str | None,
    dtype: str,
) -> None:
    """Leave the adapter in PEFT's layout with its card and tokenizer; no journal, bases or checkpoints."""
    base = lasting(expanded(base_model or str(facts.get("base_model_name_or_path") or "")))
    card = adapter / CARD_NAME
    save_adapter(
        directory,
        pairs,
        base_model=base,
        transposed=bool(facts.get("fan_in_fan_out")),
        card=card.read_text(encoding="utf-8") if card.is_file() else model_card({"base_model": base or None}),
    )
    for name in TOKENIZER_NAMES:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, directory / name)
    if dtype != "float32":
        _rewrite_as(directory / WEIGHTS_NAME, dtype)


def _rewrite_as(weights: Path, dtype: str) -> None:
    """Store the adapter's tensors in `dtype`. Raises ModelError when a number passes its range."""
    narrow = weights.with_suffix(".narrow")
    tensors = [stored_as(tensor, FLOATS[dtype]) for tensor in lazy_tensors(weights)]
    write_tensor_file(narrow, tensors)
    narrow.replace(weights)
