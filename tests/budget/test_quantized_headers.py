"""Checkpoints saved already quantized, as bitsandbytes and transformers write them."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, llama_shapes, write_safetensors

from agzo_edge.budget.facts import model_facts
from agzo_edge.errors import ModelError

NAME = "model.layers.0.mlp.down_proj"


def write_quantized(folder: Path, parts: dict[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    """A Llama whose every layer but one is dense, and that one is `parts`."""
    entries = {
        name: ("BF16", shape, bytes(2 * shape[0] * (shape[1] if len(shape) > 1 else 1)))
        for name, shape in llama_shapes().items()
        if name != f"{NAME}.weight"
    }
    (folder / "config.json").write_text(json.dumps(LLAMA))
    write_safetensors(folder / "model.safetensors", entries | {f"{NAME}.{key}": part for key, part in parts.items()})
    return str(folder)


def four_bit(state: Any, *, nested: bool = False) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors of a packed (16, 32) layer."""
    text = json.dumps(state).encode()
    parts = {
        "weight": ("U8", (256, 1), bytes(256)),
        "weight.absmax": ("U8", (8,), bytes(8)) if nested else ("F32", (8,), bytes(32)),
        "weight.quant_map": ("F32", (16,), bytes(64)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (len(text),), text),
    }
    return parts | ({"weight.nested_absmax": ("F32", (1,), bytes(4))} if nested else {})


@pytest.mark.parametrize(("nested", "stored_as"), [(False, "4bit"), (True, "4bit-nested")])
def test_a_packed_layer_has_the_shape_its_state_tells(tmp_path: Path, nested: bool, stored_as: str) -> None:
    facts = model_facts(write_quantized(tmp_path, four_bit({"shape": [16, 32]}, nested=nested)))
    assert facts.linears[NAME] == (16, 32)
    assert facts.stored_as == stored_as
    assert facts.other_entries == 32  # the norms: scales and code books belong to the weights


def test_a_packed_layer_without_its_state_is_inferred_from_the_width(tmp_path: Path) -> None:
    parts = four_bit({"shape": [16, 32]})
    del parts["weight.quant_state.bitsandbytes__nf4"]
    assert model_facts(write_quantized(tmp_path, parts)).linears[NAME] == (16, 32)


@pytest.mark.parametrize("state", [{}, {"shape": [16, 33]}, {"shape": [0, 32]}, {"shape": "wide"}, [], {"shape": [1]}])
def test_a_state_that_does_not_match_its_weight_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(ModelError, match="broken checkpoint"):
        model_facts(write_quantized(tmp_path, four_bit(state)))


def test_an_eight_bit_layer_is_known_by_its_row_scales(tmp_path: Path) -> None:
    parts = {"weight": ("I8", (16, 32), bytes(512)), "SCB": ("F32", (16,), bytes(64))}
    facts = model_facts(write_quantized(tmp_path, parts))
    assert facts.stored_as == "8bit"
    assert facts.linears[NAME] == (16, 32)
    assert facts.other_entries == 32
