"""Adapters of strangers: read rightly or refused with a message."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agzo_edge.errors import AdapterError
from agzo_edge.record.adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
KEY = "base_model.model.q.lora_"
WEIGHTS = {f"{KEY}A.weight": torch.ones(2, 4), f"{KEY}B.weight": torch.ones(3, 2)}


def _adapter(directory: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps(CONFIG | config))
    safetensors.torch.save_file(WEIGHTS | weights, directory / WEIGHTS_NAME)
    return directory


def test_the_plain_one_loads_with_its_scaling_in_b(tmp_path: Path) -> None:
    pairs = load_adapter(_adapter(tmp_path, {}, {}))
    assert torch.equal(pairs["q"].b, torch.full((3, 2), 2.0))


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"some_future_field": 1}, "some_future_field is 1"),
        ({"r": 0}, "r is 0: it must be a whole number from 1"),
        ({"r": "2"}, "r is '2'"),
        ({"r": True}, "r is True"),
        ({"r": 3}, "and the configuration says rank 3"),
        ({"lora_alpha": None}, "lora_alpha is None: it must be a finite number"),
        ({"rank_pattern": {"q": 1}}, "says rank 1"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern: 'q' has -1"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "no pattern that can be matched quickly"),
        ({"alpha_pattern": {".*.*.*.*x": 1}}, "no pattern that can be matched quickly"),
        ({"alpha_pattern": {"a)|(b": 1}}, None),
        ({"alpha_pattern": {"(a|aa)" * 40: 1}}, "no pattern that can be matched quickly"),
        ({"alpha_pattern": {"[[a]": 1}}, "no pattern that can be matched quickly"),
        ({"alpha_pattern": {f"q{i}|k": 1 for i in range(9)} | {f".*{i}": 1 for i in range(65)}}, "more than 64 patt"),
        ({"\ud800": 1}, "half a surrogate pair"),
        ({"use_\x1b[2Jdora": True}, r"'use_\\x1b\[2Jdora' is True"),
        ({"alpha_pattern": {"(": 1}}, "no pattern that can be matched quickly"),
        ({"alpha_pattern": {"(?i)q": 1}}, "no pattern that can be matched quickly"),
        ({"bias": "all", "use_dora": True}, r"bias is .*\n.*use_dora"),
    ],
)
def test_what_is_more_than_a_pair_for_each_layer_is_refused(
    tmp_path: Path, config: dict[str, Any], fault: str | None
) -> None:
    directory = _adapter(tmp_path, config, {})
    if fault is None:  # odd, and PEFT takes it
        assert load_adapter(directory).keys() == {"q"}
        return
    with pytest.raises(AdapterError, match=fault):
        load_adapter(directory)


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"base_model.model.e.lora_embedding_A": torch.ones(2, 4)}, "only lora_A and lora_B"),
        ({"base_model.model.q.lora_magnitude_vector": torch.ones(3)}, "only lora_A and lora_B"),
        ({"base_model.model.q.base_layer.weight": torch.ones(3, 4)}, "only lora_A and lora_B"),
        ({"base_model.model.k.lora_A.weight": torch.ones(2, 4)}, "k: lora_B is missing"),
        ({f"{KEY}B.weight": torch.ones(3, 1)}, r"q: lora_A is \(2, 4\) and lora_B \(3, 1\)"),
        ({f"{KEY}A.weight": torch.ones(2, 4, 1, 1)}, "not the matrices"),
        ({f"{KEY}A.weight": torch.ones(2, 4, dtype=torch.int8)}, "torch.int8: 16- or 32-bit floats"),
        ({f"{KEY}A.weight": torch.full((2, 4), torch.inf)}, r"NaN or infinite weights in 1 layers:\n  q"),
        ({f"{KEY}B.weight": torch.full((3, 2), 3e38)}, "NaN or infinite"),
    ],
)
def test_tensors_that_are_no_pairs_are_refused_by_name(tmp_path: Path, weights: dict[str, Tensor], fault: str) -> None:
    with pytest.raises(AdapterError, match=fault):
        load_adapter(_adapter(tmp_path, {}, weights))


def test_a_pickled_adapter_is_refused_unread(tmp_path: Path) -> None:
    directory = _adapter(tmp_path, {}, {})
    (directory / WEIGHTS_NAME).rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only safetensors is read, adapter_model\.bin can run code"):
        load_adapter(directory)


def test_a_directory_without_a_configuration_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_adapter_is_an_error_or_a_sound_set_of_pairs(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = _adapter(tmp_path_factory.getbasetemp() / "damaged", {}, {})
    path = directory / data.draw(st.sampled_from([CONFIG_NAME, WEIGHTS_NAME]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        pairs = load_adapter(directory)
    except AdapterError:
        return
    for pair in pairs.values():
        assert pair.a.shape[0] == pair.b.shape[1]
        assert pair.a.isfinite().all()
        assert pair.b.isfinite().all()
