"""Loading: every family in every width, and what cannot be trained refused by name."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    EXPERTS,
    FAMILIES,
    SHAPE,
    dense_reference,
    model_logits,
    reference,
    reference_logits,
    run_config,
    save_tiny,
    tiny_batch,
    tiny_checkpoint,
    tiny_model,
    tiny_with_images,
)
from torch.testing import assert_close

from agzo_edge.budget.block import DeltaRule
from agzo_edge.budget.facts import model_facts
from agzo_edge.errors import ModelError
from agzo_edge.model.load import load_model
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.model.weights import DenseWeight, EightBitWeight, FourBitWeight, base_weight_of

WIDTHS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "quant_type": "fp4"},
    "double": {"load_in_4bit": True, "double_quant": True},
    "int8": {"load_in_8bit": True},
}


def assert_logits_are_those_of_the_dense_model(model: EdgeModel) -> None:
    batch = tiny_batch(4)
    valid = batch.attention_mask.bool()
    expected = reference_logits(dense_reference(model), batch)
    assert_close(model_logits(model, batch)[valid], expected[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_logits_are_those_of_transformers(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(4)
    assert {type(layer.base) for layer in model.layers.values()} == {DenseWeight}
    valid = batch.attention_mask.bool()
    expected = reference_logits(reference(model.source), batch)
    assert_close(model_logits(model, batch)[valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_a_hybrid_s_state_space_mixers_are_left_as_they_are(tmp_path: Path) -> None:
    mixer = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    save_tiny(transformers.FalconH1Config(**SHAPE, **mixer), tmp_path)
    config = run_config(target_modules=("all-linear",), load_in_4bit=True)
    model, facts = load_model(str(tmp_path), config), model_facts(str(tmp_path))
    assert {"q_proj", "down_proj"} <= {name.rpartition(".")[2] for name in model.layers}
    assert not any("mamba" in name for name in model.layers)
    assert set(facts.targets(config.target_modules)) == set(model.layers)
    assert_logits_are_those_of_the_dense_model(model)


@pytest.mark.parametrize(
    ("family", "like"), [("Gemma3Config", "gemma3"), ("Qwen3VLConfig", "qwen3"), ("Mistral3Config", "mistral")]
)
def test_a_tower_for_images_is_no_part_of_the_model(tmp_path: Path, family: str, like: str) -> None:
    source, text = str(tiny_with_images(tmp_path, family)), model_facts(tiny_checkpoint(like))
    config = run_config(target_modules=("all-linear",), load_in_4bit=True)
    model, facts = load_model(source, config), model_facts(source)
    assert len(model.layers) == len(facts.targets(config.target_modules)) == len(text.linears)
    assert not any("vision" in name for name in [*model.layers, *facts.linears])
    assert facts.other_entries == text.other_entries
    assert_logits_are_those_of_the_dense_model(model)


def test_layers_of_linear_attention_are_trained_like_any(tmp_path: Path) -> None:
    rule = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    save_tiny(transformers.Qwen3_5TextConfig(**SHAPE | rule | {"num_hidden_layers": 4}), tmp_path)
    model, facts = load_model(str(tmp_path), run_config(load_in_4bit=True)), model_facts(str(tmp_path))
    assert facts.block.delta_rule == DeltaRule(heads=4, key_dim=8, value_dim=8)
    assert any(name.endswith("linear_attn.out_proj") for name in model.layers)
    assert_logits_are_those_of_the_dense_model(model)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_logits_are_those_of_the_dequantized_weights(family: str, width: str) -> None:
    model = tiny_model(family, **WIDTHS[width])
    kind = EightBitWeight if width == "int8" else FourBitWeight
    assert {type(layer.base) for layer in model.layers.values()} == {kind}
    assert_logits_are_those_of_the_dense_model(model)


@pytest.mark.parametrize("width", ["plain", *WIDTHS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_in_bfloat16(family: str, width: str) -> None:
    model, batch = tiny_model(family, **WIDTHS.get(width, {}), dtype="bfloat16"), tiny_batch(4)
    assert {layer.base.dense().dtype for layer in model.layers.values()} == {torch.bfloat16}
    valid = batch.attention_mask.bool()
    ours = model_logits(model, batch)[valid]
    assert ours.dtype is torch.bfloat16
    expected = reference_logits(dense_reference(model), batch)[valid]
    assert float((ours - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("hidden_size", [68, 100])
def test_widths_that_are_no_multiple_of_a_quantization_block_work(hidden_size: int, width: str) -> None:
    source = tiny_checkpoint("llama", hidden_size=hidden_size, intermediate_size=hidden_size + 2)
    model = load_model(source, run_config(**WIDTHS[width]))
    assert {layer.in_features for layer in model.layers.values()} == {64, hidden_size, hidden_size + 2}
    assert_logits_are_those_of_the_dense_model(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", ["plain", "nf4", "int8"])
def test_tied_and_untied_heads_are_read_as_they_are(tied: bool, width: str) -> None:
    source = tiny_checkpoint("llama", tie_word_embeddings=tied)
    model = load_model(source, run_config(**WIDTHS.get(width, {})))
    head = model.network.get_output_embeddings().base.dense()
    embeddings = model.network.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) is tied
    assert_logits_are_those_of_the_dense_model(model)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_checkpoint_saved_quantized_has_the_same_bytes_when_it_is_loaded(width: str, tmp_path: Path) -> None:
    ours = tiny_model("llama", **WIDTHS[width])
    quantization = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }[width]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            ours.source,
            dtype=torch.float32,
            quantization_config=transformers.BitsAndBytesConfig(**quantization),
        )
    theirs.save_pretrained(tmp_path)
    shutil.copy(Path(ours.source) / "tokenizer.json", tmp_path)
    shutil.copy(Path(ours.source) / "tokenizer_config.json", tmp_path)
    reloaded = load_model(str(tmp_path), run_config(load_in_4bit=True))  # what the file says wins
    assert reloaded.base_sha256() == ours.base_sha256()
    assert_close(model_logits(reloaded, tiny_batch(3)), model_logits(ours, tiny_batch(3)))


@pytest.mark.parametrize("width", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_head_that_was_saved_quantized_is_read_as_it_is(width: dict[str, bool], tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    settings = transformers.BitsAndBytesConfig(**width, llm_int8_skip_modules=["nothing"])  # else the head is left out
    saved = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings)
    saved.save_pretrained(tmp_path)
    shutil.copy(Path(source) / "tokenizer.json", tmp_path)
    model = load_model(str(tmp_path), run_config())
    stored = base_weight_of(saved.lm_head, name="lm_head", dtype=torch.float32).dense()
    assert type(model.head.base) is DenseWeight
    assert torch.equal(model.head.base.dense(), stored)
    assert not torch.equal(stored, tiny_model("llama").head.base.dense())


def test_loading_twice_gives_the_same_bytes_and_other_widths_others() -> None:
    hashes = [tiny_model("llama", **WIDTHS[width]).base_sha256() for width in ("nf4", "nf4", "fp4", "double", "int8")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


def test_nothing_in_a_loaded_model_asks_for_a_gradient() -> None:
    network = tiny_model("gpt2").network
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_target_modules_choose_layers_by_name_and_by_path() -> None:
    model = tiny_model("llama", target_modules=("q_proj", "model.layers.1.mlp.up_proj"))
    assert [branch.name for branch in model.branches] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert_logits_are_those_of_the_dense_model(model)


def test_target_modules_that_match_nothing_are_named_together() -> None:
    with pytest.raises(ModelError, match="matches w1, proj; there are down_proj, gate_proj, k_proj"):
        tiny_model("llama", target_modules=("w1", "q_proj", "proj"))


@pytest.mark.parametrize("kind", ["MixtralConfig", "Qwen3MoeConfig"])
def test_fused_experts_are_refused_by_name_unless_they_are_left_out(kind: str, tmp_path: Path) -> None:
    source = str(save_tiny(getattr(transformers, kind)(**SHAPE, **EXPERTS), tmp_path))
    with pytest.raises(ModelError, match=r"--target-modules(.|\n)*layers\.0\.mlp\.experts\.gate_up_proj"):
        load_model(source, run_config(load_in_4bit=True))
    used = load_model(source, run_config(load_in_4bit=True), trains=False)
    assert_logits_are_those_of_the_dense_model(used)
    model = load_model(source, run_config(load_in_4bit=True, target_modules=("q_proj", "o_proj")))
    assert len(model.branches) == 4
    assert_logits_are_those_of_the_dense_model(model)


def edited_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_bin(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, directory / "pytorch_model.bin")


def cut_short(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bin": (only_bin, "no safetensors file"),
    "remote": (
        lambda d: edited_config(d, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        "--trust-remote-code",
    ),
    "cut": (cut_short, "incomplete metadata"),
    "garbage": (lambda d: (d / "model.safetensors").write_bytes(b"garbage" * 99), "cannot be loaded"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no safetensors file"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "not a valid JSON"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
    "no file of a tokenizer": (
        lambda d: [path.unlink() for path in d.glob("token*")],
        "holds no tokenizer: copy tokenizer.json",
    ),
    "layers that are fewer than their kinds": (
        lambda d: edited_config(
            d, model_type="qwen3", architectures=["Qwen3ForCausalLM"], layer_types=["full_attention"] * 9
        ),
        "config.json cannot be used: .*number of `layer_types`",
    ),
    "other shape": (
        lambda d: edited_config(d, vocab_size=200),
        r"embed_tokens.weight: \(300, 64\) in the file",
    ),
    "other quantization": (
        lambda d: edited_config(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized by gptq",
    ),
    "more layers": (
        lambda d: edited_config(d, num_hidden_layers=3),
        r"layers\.2\.mlp\.up_proj\.weight: missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_directory_that_is_no_whole_model_is_refused_with_the_reason(damage: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    (directory / "own.py").write_text("raise SystemExit('remote code was run')\n")
    do, message = DAMAGES[damage]
    do(directory)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(directory), run_config(load_in_4bit=True))
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "model_class", "message"),
    [
        (
            transformers.T5Config(vocab_size=300, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4),
            transformers.T5ForConditionalGeneration,
            "Unrecognized configuration class",
        ),
        (
            transformers.BertConfig(
                vocab_size=300,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
            ),
            transformers.BertForMaskedLM,
            "no causal language model",
        ),
        (
            transformers.LlamaConfig(**SHAPE),
            transformers.LlamaForSequenceClassification,
            "lm_head.weight: missing",
        ),
        (transformers.LlamaConfig(**SHAPE), transformers.LlamaModel, "lm_head.weight: missing"),
    ],
    ids=["t5", "bert", "classifier", "headless"],
)
def test_what_is_no_causal_language_model_is_refused(
    config: Any, model_class: Any, message: str, tmp_path: Path
) -> None:
    save_tiny(config, tmp_path, model_class=model_class)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path), run_config())
