"""A merged checkpoint is the base with the adapter's weights added."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exporting import add_, files_in, layers_of, logits, make_adapter, random_pairs
from helpers import VOCAB, reference, tiny_checkpoint, tiny_with_images
from safetensors.torch import load_file, save_file

from agzo_edge.errors import AdapterError, ModelError
from agzo_edge.model.weights import base_weight_of
from agzo_edge.record.adapter import LowRankPair, save_adapter
from agzo_edge.serve.export import export_adapter


@pytest.fixture
def llama(tmp_path: Path) -> tuple[str, Path, dict[str, LowRankPair]]:
    """A base model, an adapter of it, and the adapter's pairs."""
    source = tiny_checkpoint("llama")
    return source, tmp_path / "adapter", make_adapter(tmp_path / "adapter", source)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "neox", "opt"])
def test_a_merged_checkpoint_gives_the_logits_of_the_base_with_added_weights(tmp_path: Path, family: str) -> None:
    source = tiny_checkpoint(family)
    pairs = make_adapter(tmp_path / "adapter", source, transposed=family == "gpt2")
    export_adapter(tmp_path / "adapter", to="merged", output=tmp_path / "out")
    expected = logits(add_(reference(source), pairs))
    torch.testing.assert_close(logits(reference(str(tmp_path / "out"))), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(reference(source)), expected, atol=1e-2)


def test_a_merged_checkpoint_brings_the_tokenizer_and_the_generation_settings(
    tmp_path: Path, llama: tuple[str, Path, Any]
) -> None:
    source, adapter, _ = llama
    export_adapter(adapter, to="merged", output=tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(Path(source))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_sixteen_bit_weights_are_added_to_in_float32_and_rounded_once(
    tmp_path: Path, llama: tuple[str, Path, Any], dtype: str | None
) -> None:
    source, adapter, pairs = llama
    reference(source, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    export_adapter(adapter, to="merged", output=tmp_path / "out", model_source=str(tmp_path / "base"), dtype=dtype)
    name = "model.layers.1.mlp.down_proj"
    before = load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"]
    after = load_file(tmp_path / "out" / "model.safetensors")
    summed = before.float() + pairs[name].b @ pairs[name].a
    stored_as = torch.float32 if dtype else torch.bfloat16
    assert torch.equal(after[f"{name}.weight"], summed.to(stored_as))
    assert {tensor.dtype for tensor in after.values()} == {stored_as}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == stored_as


def test_a_sharded_checkpoint_keeps_its_shards(tmp_path: Path, llama: tuple[str, Path, Any]) -> None:
    source, adapter, pairs = llama
    base = tmp_path / "base"
    reference(source).save_pretrained(base, max_shard_size="100KB")
    export_adapter(adapter, to="merged", output=tmp_path / "out", model_source=str(base))
    index = json.loads((base / "model.safetensors.index.json").read_text())
    merged = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert merged["weight_map"] == index["weight_map"]
    assert merged["metadata"]["total_size"] == index["metadata"]["total_size"]
    expected = logits(add_(reference(source), pairs))
    torch.testing.assert_close(logits(reference(str(tmp_path / "out"))), expected, rtol=1e-5, atol=1e-5)


def test_a_gpt2_checkpoint_without_its_prefix_is_merged(tmp_path: Path) -> None:
    source = tiny_checkpoint("gpt2")
    pairs = make_adapter(tmp_path / "adapter", source, transposed=True)
    base = tmp_path / "base"
    reference(source).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    export_adapter(tmp_path / "adapter", to="merged", output=tmp_path / "out", model_source=str(base))
    expected = logits(add_(reference(source), pairs))
    torch.testing.assert_close(logits(reference(str(tmp_path / "out"))), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_whose_names_are_otherwise_nested_is_merged(tmp_path: Path) -> None:
    source = str(tiny_with_images(tmp_path / "base"))
    of_text = {name: pair for name, pair in random_pairs(reference(source)).items() if "language_model" in name}
    save_adapter(tmp_path / "adapter", of_text, base_model=source, transposed=False, card="")
    export_adapter(tmp_path / "adapter", to="merged", output=tmp_path / "out")
    expected = logits(add_(reference(source), of_text))
    torch.testing.assert_close(logits(reference(str(tmp_path / "out"))), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected, logits(reference(source)))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("llama", {"load_in_8bit": True}),
        ("qwen3", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
    ],
)
def test_a_checkpoint_saved_quantized_is_merged_in_full_width(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    # bitsandbytes 0.50 dequantizes 4-bit weights wrongly on a CPU unless rows are a multiple of 64 wide
    source, base = tiny_checkpoint(family, intermediate_size=128), str(tmp_path / "base")
    pairs = make_adapter(tmp_path / "adapter", source)
    save_quantized(source, base, settings)
    export_adapter(tmp_path / "adapter", to="merged", output=tmp_path / "out", model_source=base)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    expected = logits(add_(dequantized(source, base), pairs))
    torch.testing.assert_close(logits(reference(str(tmp_path / "out"))), expected, rtol=1e-5, atol=1e-5)


def dequantized(source: str, base: str) -> Any:
    """The model at `source` with the weights that transformers finds in the quantized checkpoint `base`."""
    plain = reference(source)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in layers_of(plain).items():
            dense = base_weight_of(quantized.get_submodule(name), name=name, dtype=torch.float32).dense()
            error = (dense - layer.weight).norm() / layer.weight.norm()
            assert error < 0.2, "the quantized checkpoint is not a rounding of the plain one"
            layer.weight.copy_(dense)
    return plain


def save_quantized(source: str, directory: str, settings: dict[str, Any]) -> None:
    quantization = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=torch.float32
    )
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def test_a_weight_past_the_range_of_float16_is_refused_and_nothing_is_left(
    tmp_path: Path, llama: tuple[str, Path, Any]
) -> None:
    source, adapter, _ = llama
    base = tmp_path / "base"
    reference(source).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*float16.*another dtype"):
        export_adapter(adapter, to="merged", output=tmp_path / "out", model_source=str(base), dtype="float16")
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_of_another_model_is_refused_with_every_layer_that_does_not_fit(
    tmp_path: Path, llama: tuple[str, Path, Any]
) -> None:
    other = tiny_checkpoint("llama", intermediate_size=80)
    with pytest.raises(AdapterError, match="does not fit") as caught:
        export_adapter(llama[1], to="merged", output=tmp_path / "out", model_source=other)
    assert str(caught.value).count("mlp.") == 6  # gate, up and down of two layers, and no other
    with pytest.raises(AdapterError, match="no such linear layer"):
        export_adapter(llama[1], to="merged", output=tmp_path / "out", model_source=tiny_checkpoint("gpt2"))
    assert not (tmp_path / "out").exists()


def test_a_change_to_a_head_that_shares_the_embeddings_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3")
    pair = LowRankPair(torch.ones(1, 64), torch.ones(VOCAB, 1))
    save_adapter(tmp_path / "adapter", {"lm_head": pair}, base_model=source, transposed=False, card="")
    with pytest.raises(AdapterError, match=r"lm_head.*weight of its own"):
        export_adapter(tmp_path / "adapter", to="merged", output=tmp_path / "out")


def test_a_trained_head_of_its_own_is_merged(tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    pair = LowRankPair(torch.ones(1, 64) / 8, torch.linspace(0, 1, VOCAB).unsqueeze(1))
    save_adapter(tmp_path / "adapter", {"lm_head": pair}, base_model=source, transposed=False, card="")
    export_adapter(tmp_path / "adapter", to="merged", output=tmp_path / "out")
    merged, base = reference(str(tmp_path / "out")), reference(source)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight + pair.b @ pair.a)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda base: (base / "config.json").unlink(), "no config.json"),
        (lambda base: (base / "config.json").write_text("{"), "config.json"),
        (lambda base: disagree(base), "config.json cannot be used: .*number of `layer_types`"),
        (lambda base: (base / "model.safetensors").unlink(), "only safetensors is read"),
        (lambda base: (base / "model.safetensors").write_bytes(b"x" * 64), "cannot be read as safetensors"),
        (lambda base: rename_a_tensor(base), r"q_proj: 0 tensors may be its weight"),
        (lambda base: set_quantization(base), "quantized by gptq.*original checkpoint"),
        (lambda base: name_shards(base, "../secret.safetensors"), r"outside its directory: '\.\./secret\.safetensors'"),
        (lambda base: name_shards(base, "gone.safetensors"), "gone.safetensors: missing"),
        (lambda base: put_below(base, "below/one.safetensors"), "'below/one.safetensors': no plain name"),
        (lambda base: put_below(base, "one.bin"), "'one.bin': no plain name of a safetensors file"),
    ],
)
def test_a_broken_base_is_refused_by_what_is_wrong_with_it(
    tmp_path: Path, llama: tuple[str, Path, Any], break_: Any, message: str
) -> None:
    source, adapter, _ = llama
    base = tmp_path / "base"
    reference(source).save_pretrained(base)
    break_(base)
    with pytest.raises(ModelError, match=message):
        export_adapter(adapter, to="merged", output=tmp_path / "out", model_source=str(base))
    assert not (tmp_path / "out").exists()


def rename_a_tensor(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["elsewhere"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, base / "model.safetensors")


def disagree(base: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"model_type": "qwen3", "layer_types": ["full_attention"]}
    (base / "config.json").write_text(json.dumps(config))


def set_quantization(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))


def put_below(base: Path, name: str) -> None:
    weights = (base / "model.safetensors").read_bytes()
    name_shards(base, name)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_bytes(weights)


def name_shards(base: Path, *names: str) -> None:
    (base / "model.safetensors").unlink()
    index = {"weight_map": {f"tensor_{i}": name for i, name in enumerate(names)}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_hub_id_that_cannot_be_had_offline_is_refused(
    tmp_path: Path, llama: tuple[str, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="no/such-model: no such directory"):
        export_adapter(llama[1], to="merged", output=tmp_path / "out", model_source="no/such-model")
