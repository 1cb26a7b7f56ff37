"""llama.cpp's form of an adapter, read back with llama.cpp's own package."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import make_adapter
from helpers import tiny_checkpoint

from agzo_edge.errors import ModelError, UsageError
from agzo_edge.record.adapter import LowRankPair, save_adapter
from agzo_edge.serve.export import export_adapter

gguf = pytest.importorskip("gguf")

HEADS, KEY_HEADS, HEAD_FEATURES = 4, 2, 16  # of helpers.SHAPE


@pytest.fixture
def llama(tmp_path: Path) -> tuple[str, Path, dict[str, LowRankPair]]:
    """A base model, an adapter of it, and the adapter's pairs."""
    source = tiny_checkpoint("llama")
    return source, tmp_path / "adapter", make_adapter(tmp_path / "adapter", source)


def read_gguf(directory: Path) -> Any:
    return gguf.GGUFReader(directory / "adapter.gguf")


def values_in(reader: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: tensor.data for tensor in reader.tensors}


def unscaled(tensors: dict[str, Any], alpha: float, name: str) -> np.ndarray[Any, Any]:
    """What llama.cpp adds to the weight `name`: b @ a by alpha over the tensor's own rank."""
    a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
    change: np.ndarray[Any, Any] = (b.astype(np.float64) @ a.astype(np.float64)) * (alpha / b.shape[1])
    return change


def in_llama_cpps_order(change: np.ndarray[Any, Any], n_heads: int) -> np.ndarray[Any, Any]:
    """Row by row: in each head, row i of the first half goes to 2i, of the second half to 2i + 1."""
    reordered = np.empty_like(change)
    half = HEAD_FEATURES // 2
    for head in range(n_heads):
        for i in range(half):
            start = head * HEAD_FEATURES
            reordered[start + 2 * i] = change[start + i]
            reordered[start + 2 * i + 1] = change[start + half + i]
    return reordered


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_llama_cpp_finds_every_change_under_its_own_name_and_in_its_own_order(tmp_path: Path, family: str) -> None:
    pairs = make_adapter(tmp_path / "adapter", tiny_checkpoint(family))
    export_adapter(tmp_path / "adapter", to="gguf", output=tmp_path / "out")
    reader = read_gguf(tmp_path / "out")
    facts = {name: reader.get_field(name).contents() for name in reader.fields if "." in name}
    architecture = "llama" if family == "mistral" else family
    assert facts["general.type"] == "adapter"
    assert facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == architecture
    tensors = values_in(reader)
    assert len(tensors) == 2 * len(pairs)
    words = {
        "self_attn.q_proj": ("attn_q", HEADS),
        "self_attn.k_proj": ("attn_k", KEY_HEADS),
        "self_attn.v_proj": ("attn_v", None),
        "self_attn.o_proj": ("attn_output", None),
        "mlp.gate_proj": ("ffn_gate", None),
        "mlp.up_proj": ("ffn_up", None),
        "mlp.down_proj": ("ffn_down", None),
    }
    for layer in range(2):
        for ours, (theirs, n_heads) in words.items():
            pair = pairs[f"model.layers.{layer}.{ours}"]
            expected = (pair.b.double() @ pair.a.double()).numpy()
            if n_heads and architecture == "llama":
                expected = in_llama_cpps_order(expected, n_heads)
            change = unscaled(tensors, facts["adapter.lora.alpha"], f"blk.{layer}.{theirs}")
            np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-6)


def test_fused_layers_of_phi3_keep_their_rows(tmp_path: Path) -> None:
    pairs = make_adapter(tmp_path / "adapter", tiny_checkpoint("phi3"))
    export_adapter(tmp_path / "adapter", to="gguf", output=tmp_path / "out")
    reader = read_gguf(tmp_path / "out")
    tensors, alpha = values_in(reader), reader.get_field("adapter.lora.alpha").contents()
    for ours, theirs in {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}.items():
        pair = pairs[f"model.layers.1.{ours}"]
        change = unscaled(tensors, alpha, f"blk.1.{theirs}")
        np.testing.assert_allclose(change, (pair.b @ pair.a).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", "F16"), ("bfloat16", "BF16"), (None, "F32")])
def test_a_gguf_stores_the_type_that_was_asked_for(
    tmp_path: Path, llama: tuple[str, Path, Any], dtype: str | None, bits: str
) -> None:
    export_adapter(llama[1], to="gguf", output=tmp_path / "out", dtype=dtype)
    reader = read_gguf(tmp_path / "out")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {bits}
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.lora_a"][0] == 96  # GGUF names the innermost dimension first
    assert shapes["blk.0.ffn_down.weight.lora_b"][1] == 64


def test_an_architecture_that_llama_cpp_reorders_in_its_own_way_is_refused_by_name(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", tiny_checkpoint("gpt2"), transposed=True)
    with pytest.raises(ModelError, match=r"is a gpt2 model.*llama, mistral, qwen2"):
        export_adapter(tmp_path / "adapter", to="gguf", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_number_past_float16_is_refused_in_gguf(tmp_path: Path) -> None:
    pair = LowRankPair(torch.full((1, 64), 1e5), torch.ones(64, 1))
    pairs = {"model.layers.0.self_attn.q_proj": pair}
    save_adapter(tmp_path / "adapter", pairs, base_model=tiny_checkpoint("llama"), transposed=False, card="")
    with pytest.raises(ModelError, match=r"attn_q\.weight\.lora_a: passes the range of float16"):
        export_adapter(tmp_path / "adapter", to="gguf", output=tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_without_the_gguf_package_the_message_says_what_to_install(
    tmp_path: Path, llama: tuple[str, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="pip install gguf"):
        export_adapter(llama[1], to="gguf", output=tmp_path / "out")
