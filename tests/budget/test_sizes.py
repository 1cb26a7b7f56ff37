"""Sizes that config.json leaves to the defaults of its class, and tensors that no model is made of."""

from typing import Any

import pytest
from checkpoints import LLAMA, facts_by_headers, llama_facts, llama_shapes

from agzo_edge.budget.memory import predicted_memory
from agzo_edge.budget.profile import load_profile
from agzo_edge.config import config_from
from agzo_edge.errors import ModelError

GPU = load_profile("rtx-3060-12gb")
LEFT_OUT = ("num_attention_heads", "num_key_value_heads", "vocab_size", "hidden_size", "num_hidden_layers")


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in LLAMA.items() if name not in names}


def gemma_shapes() -> dict[str, tuple[int, ...]]:
    """Two blocks of google/gemma-3-4b-it."""
    shapes: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (262_208, 2560)}
    layers = {"q_proj": (2048, 2560), "k_proj": (1024, 2560), "v_proj": (1024, 2560), "o_proj": (2560, 2048)}
    attention: dict[str, tuple[int, ...]] = {**layers, "q_norm": (256,), "k_norm": (256,)}
    mlp = {"gate_proj": (10_240, 2560), "up_proj": (10_240, 2560), "down_proj": (2560, 10_240)}
    for block in range(2):
        start = f"language_model.model.layers.{block}"
        shapes |= {f"{start}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{start}.mlp.{name}.weight": shape for name, shape in mlp.items()}
    return shapes


def test_what_equals_gemma_3_s_defaults_is_told_by_its_tensors() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 2}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    facts = facts_by_headers(config, gemma_shapes())
    assert (facts.vocab_size, facts.n_heads, facts.query_width, facts.kv_width) == (262_208, 8, 2048, 1024)


@pytest.mark.parametrize("left_out", [*((name,) for name in LEFT_OUT), LEFT_OUT])
def test_sizes_that_are_left_out_are_those_of_the_whole_configuration(left_out: tuple[str, ...]) -> None:
    whole, partly = llama_facts(), facts_by_headers(without(*left_out), llama_shapes())
    for size in ("vocab_size", "hidden_size", "n_layers", "query_width", "kv_width"):
        assert getattr(partly, size) == getattr(whole, size)


def test_bloom_s_width_is_found_by_its_name() -> None:
    shapes = {
        "word_embeddings.weight": (50, 16),
        "word_embeddings_layernorm.weight": (16,),
        "h.0.self_attention.query_key_value.weight": (48, 16),
        "h.0.self_attention.dense.weight": (16, 16),
    }
    config = {"architectures": ["BloomForCausalLM"], "n_embed": 16, "n_layer": 1, "n_head": 4, "vocab_size": 50}
    facts = facts_by_headers(config, shapes)
    assert (facts.hidden_size, facts.n_heads, facts.query_width, facts.kv_width) == (16, 4, 16, 16)


@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("value", [10**320, -1, "8", [8]])
def test_what_can_be_no_size_is_refused(name: str, value: object) -> None:
    with pytest.raises(ModelError, match=name):
        facts_by_headers(LLAMA | {name: value}, llama_shapes())


def test_sizes_that_are_told_otherwise_may_be_odd() -> None:
    odd = {"intermediate_size": 10**320, "layer_types": [{"a": 1}], "sliding_window": 10**320}
    facts = facts_by_headers(LLAMA | odd, llama_shapes())
    assert (facts.block.mlp_width, facts.block.window) == (32, None)
    assert predicted_memory(facts, config_from({}), GPU).device_bytes > 0


def test_blocks_that_are_not_loaded_are_neither_held_nor_trained() -> None:
    usual = llama_facts()
    deeper = llama_shapes(LLAMA | {"num_hidden_layers": 4})
    ahead = {name.replace("model.", "mtp.", 1): shape for name, shape in llama_shapes().items() if ".layers." in name}
    for shapes, stored in ((deeper, 4), (llama_shapes() | ahead, 2)):
        facts = facts_by_headers(LLAMA, shapes)
        assert facts.linears == usual.linears
        assert facts.n_parameters == usual.n_parameters
        assert facts.layers_stored == stored


def test_a_block_s_number_of_thousands_of_digits_is_none() -> None:
    shapes = llama_shapes() | {f"model.layers.{'9' * 5000}.mlp.up_proj.weight": (4, 16)}
    assert facts_by_headers(LLAMA, shapes).layers_stored == 2


def test_causal_masks_of_old_files_take_no_memory() -> None:
    masks = {f"model.layers.{block}.self_attn.bias": (1, 1, 2048, 2048) for block in range(2)}
    assert facts_by_headers(LLAMA, llama_shapes() | masks).n_parameters == llama_facts().n_parameters


def test_embeddings_of_each_layer_are_embeddings_and_wait_outside_with_the_others() -> None:
    shapes = llama_shapes() | {"model.embed_tokens_per_layer.weight": (50, 64)}
    facts = facts_by_headers(LLAMA, shapes)
    assert facts.embedding_entries == llama_facts().embedding_entries + 50 * 64
    assert facts.other_entries == llama_facts().other_entries
