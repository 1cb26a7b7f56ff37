import json
import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import LLAMA, llama_shapes, write_llama, write_safetensors
from huggingface_hub.errors import SafetensorsParsingError
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.budget.facts import input_groups, model_facts
from agzo_edge.budget.headers import read_checkpoint, shard_names
from agzo_edge.errors import ModelError


def test_a_single_file_gives_every_layer_with_its_true_shape(tmp_path: Path) -> None:
    facts = model_facts(str(write_llama(tmp_path)))
    assert len(facts.linears) == 14
    assert facts.linears["model.layers.1.mlp.down_proj"] == (16, 32)
    assert (facts.embedding_entries, facts.head_entries, facts.other_entries) == (800, 800, 32)
    assert facts.stored_as == "dense"
    assert facts.block.mlp_style == "gated"


def test_parameters_are_what_the_tensors_hold(tmp_path: Path) -> None:
    facts = model_facts(str(write_llama(tmp_path)))
    assert facts.n_parameters == sum(tensor.n_entries for tensor in facts.tensors.values())


def test_layers_that_read_the_same_input_share_a_group(tmp_path: Path) -> None:
    groups = input_groups(model_facts(str(write_llama(tmp_path))).linears)
    assert list(groups.values()) == [16, 16, 16, 32] * 2  # qkv, o, gate and up, down


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    whole = model_facts(str(write_llama(tmp_path / "whole")))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    weight_map = {}
    for number, (name, shape) in enumerate(llama_shapes().items()):
        file = f"model-{number:05}-of-00020.safetensors"
        n_bytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        write_safetensors(tmp_path / file, {name: ("BF16", shape, bytes(n_bytes))})
        weight_map[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert model_facts(str(tmp_path)).linears == whole.linears


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", "\\\\s\\x", ""])
def test_a_shard_outside_the_directory_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="outside its directory"):
        shard_names({"weight_map": {"x.weight": name}}, "model")


def test_every_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"(?s)one\.safetensors.*two\.safetensors"):
        model_facts(str(tmp_path))


@pytest.mark.parametrize("claimed", [2**63, 100_000_001, 10**6])
def test_a_header_longer_than_its_file_is_refused_unread(tmp_path: Path, claimed: int) -> None:
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + b"{}")
    with pytest.raises(ModelError, match="claims a header"):
        model_facts(str(tmp_path))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write_llama(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut short"):
        model_facts(str(tmp_path))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "Q9", "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "F32"},
        {"dtype": [], "shape": [1], "data_offsets": [0, 4]},
        [1, 2],
        None,
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(tmp_path: Path, entry: object) -> None:
    write_llama(tmp_path)
    text = json.dumps({"x.weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError, match="broken checkpoint"):
        model_facts(str(tmp_path))


@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_never_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").write_bytes(content)
    with suppress(ModelError):
        read_checkpoint(folder, source="fuzz")


def test_a_deeply_nested_header_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path)
    text = b"[" * 200_000
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelError, match="broken checkpoint"):
        model_facts(str(tmp_path))


def test_a_pickled_checkpoint_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = write_llama(tmp_path) / "model.safetensors"
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors is read"):
        model_facts(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": "gptq"}, "quantization_config as 'gptq'"),
        ({"quantization_config": ["gptq"]}, "no table"),
    ],
)
def test_what_is_no_plain_causal_model_is_refused_by_reason(tmp_path: Path, change: dict, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        model_facts(str(write_llama(tmp_path, config=LLAMA | change)))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufeff nonsense"])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (write_llama(tmp_path) / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        model_facts(str(tmp_path))


def test_sizes_nested_under_text_config_are_found(tmp_path: Path) -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": LLAMA,
    }
    assert model_facts(str(write_llama(tmp_path, config=config))).hidden_size == 16


def test_a_tied_head_in_the_file_is_counted_once(tmp_path: Path) -> None:
    facts = model_facts(str(write_llama(tmp_path, config=LLAMA | {"tie_word_embeddings": True})))
    assert facts.tied
    assert facts.head_entries == 0


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_missing_directory_is_named(source: str) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        model_facts(source)


@pytest.mark.parametrize("source", ["a" * 300, "/" + "a" * 300])
def test_a_path_that_can_be_none_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match="names no directory and no model"):
        model_facts(source)


@pytest.mark.parametrize("source", ["nobody/no-such-model", "not a name!", "a" * 200])
def test_an_unknown_hub_id_says_what_was_tried(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no such directory"):
        model_facts(source)


def test_a_hub_that_cannot_be_reached_is_named_where_only_the_configuration_is_cached(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    nowhere = {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    script = "from agzo_edge.budget.facts import model_facts; model_facts('someone/model')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ | nowhere
    )
    assert "ModelError: someone/model: no such directory" in done.stderr
    assert "could not be reached" in done.stderr


def test_a_header_that_the_hub_s_client_cannot_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_llama(tmp_path) / "config.json"

    def broken(source: str) -> None:
        raise SafetensorsParsingError(f"{source} has no header")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(config))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", broken)
    with pytest.raises(ModelError, match="someone/model has no header"):
        model_facts("someone/model")


@pytest.mark.parametrize("name", ["tiny-novels", "stories260K", "tinystories-chat-3m"])
def test_a_real_checkpoint_has_the_parameters_of_its_tensors(shared_dir: Path, name: str) -> None:
    facts = model_facts(str(shared_dir / "models" / name))
    assert facts.tied
    assert facts.n_parameters == sum(tensor.n_entries for tensor in facts.tensors.values())
    assert len(facts.linears) == facts.n_layers * (4 if facts.model_type == "gpt2" else 7)


def test_conv1d_is_turned_to_out_and_in(shared_dir: Path) -> None:
    facts = model_facts(str(shared_dir / "models" / "tinystories-chat-3m"))
    assert facts.linears["transformer.h.0.attn.c_attn"] == (384, 128)
    assert facts.linears["transformer.h.0.mlp.c_proj"] == (128, 512)
