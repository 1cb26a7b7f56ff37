"""An adapter that leaves: the request, the directory, and PEFT's layout."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exporting import add_, files_in, logits, make_adapter
from helpers import reference, tiny_checkpoint
from safetensors.torch import load_file

from agzo_edge.errors import AgzoError, ConfigError, ModelError
from agzo_edge.record.adapter import LowRankPair, load_adapter
from agzo_edge.serve.export import export_adapter

# peft asks transformers a question that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def llama(tmp_path: Path) -> tuple[str, Path, dict[str, LowRankPair]]:
    """A base model, an adapter of it, and the adapter's pairs."""
    source = tiny_checkpoint("llama")
    return source, tmp_path / "adapter", make_adapter(tmp_path / "adapter", source)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_peft_export_loads_in_peft_and_adds_exactly_b_times_a(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(family)
    pairs = make_adapter(tmp_path / "adapter", source, transposed=family == "gpt2")
    export_adapter(tmp_path / "adapter", to="peft", output=tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(reference(source), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(add_(reference(source), pairs)), rtol=1e-5, atol=1e-5)


def test_a_peft_export_leaves_the_journal_behind_and_takes_the_tokenizer(
    tmp_path: Path, llama: tuple[str, Path, Any]
) -> None:
    export_adapter(llama[1], to="peft", output=tmp_path / "out", model_source="someone/model")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert files_in(tmp_path / "out") == names
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_peft_export_is_the_adapter_rounded_once(
    tmp_path: Path, llama: tuple[str, Path, Any], dtype: str
) -> None:
    source, adapter, pairs = llama
    export_adapter(adapter, to="peft", output=tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    loaded = load_adapter(tmp_path / "out")
    for name, pair in pairs.items():
        assert torch.equal(loaded[name].a, pair.a.to(getattr(torch, dtype)).float())
        assert torch.equal(loaded[name].b, pair.b.to(getattr(torch, dtype)).float())
    peft.PeftModel.from_pretrained(reference(source), tmp_path / "out")


def test_a_lora_made_by_peft_with_a_scaling_of_its_own_is_exported_with_scaling_one(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(reference(source), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", to="peft", output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4
    ours = peft.PeftModel.from_pretrained(reference(source), tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_everything_wrong_with_a_request_is_said_at_once(tmp_path: Path, llama: tuple[str, Path, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        export_adapter(llama[1], to="onnx", output=tmp_path / "a.gguf", dtype="int4")
    message = str(caught.value)
    assert "'onnx'" in message
    assert "'int4'" in message
    assert "a.gguf: name a directory" in message


@pytest.mark.parametrize("to", ["peft", "merged", "gguf"])
def test_a_directory_with_something_in_it_is_refused_and_left_alone(
    tmp_path: Path, llama: tuple[str, Path, Any], to: str
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out: is not empty \(mine\.txt"):
        export_adapter(llama[1], to=to, output=output)
    assert files_in(output) == ["mine.txt"]


def test_an_empty_directory_is_filled_and_a_killed_export_is_swept_away(
    tmp_path: Path, llama: tuple[str, Path, Any]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half.safetensors").write_bytes(b"half")
    export_adapter(llama[1], to="peft", output=tmp_path / "out")
    assert "half.safetensors" not in files_in(tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path, llama: tuple[str, Path, Any]) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out: is a file"):
        export_adapter(llama[1], to="peft", output=tmp_path / "out")


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, llama: tuple[str, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agzo_edge.serve.tensor_file._bytes_of", full)
    with pytest.raises(AgzoError, match="out: cannot be written: No space left on device"):
        export_adapter(llama[1], to="merged", output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_names_no_base_asks_for_one(tmp_path: Path, llama: tuple[str, Path, Any]) -> None:
    config = llama[1] / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match=r"names no base model.*--model"):
        export_adapter(llama[1], to="merged", output=tmp_path / "out")
    export_adapter(llama[1], to="peft", output=tmp_path / "out")
