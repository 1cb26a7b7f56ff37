"""MLPs over a part of the tokens: the same model, less memory."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    EXPERTS,
    FAMILIES,
    SHAPE,
    model_logits,
    relative_error,
    run_config,
    save_tiny,
    teach_at_random,
    tiny_batch,
    tiny_model,
)

from agzo_edge.model.load import load_model
from agzo_edge.model.offload import settle
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import Learner
from agzo_edge.train.step import agzo_step, find_bases


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_in_pieces_gives_the_logits_of_the_whole(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(4)
    teach_at_random(model)
    expected = model_logits(model, batch)
    model.context.mlp_chunk_tokens = 3
    torch.testing.assert_close(model_logits(model, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Qwen3MoeConfig", "MixtralConfig", "GptOssConfig", "BloomConfig"])
def test_routed_experts_and_a_block_that_adds_its_own_stream_work_in_pieces(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, kind)(**SHAPE, **EXPERTS)
    name = "query_key_value" if kind == "BloomConfig" else "o_proj"
    model = load_model(str(save_tiny(config, tmp_path)), run_config(target_modules=(name,)))
    batch = tiny_batch(4)
    valid = batch.attention_mask.bool()
    expected = model_logits(model, batch)[valid]
    model.context.mlp_chunk_tokens = 3
    torch.testing.assert_close(model_logits(model, batch)[valid], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_but_opt_has_mlps_that_see_no_more_than_a_piece(family: str) -> None:
    model, widths = tiny_model(family), set()
    model.context.mlp_chunk_tokens = 3
    for name, layer in model.layers.items():
        if ".mlp." in name or ".fc" in name:
            layer.register_forward_pre_hook(lambda _, args: widths.add(args[0].shape[-2]))
    model_logits(model, tiny_batch(3))
    assert (max(widths) <= 3) is (family != "opt")


@pytest.mark.parametrize("difference", ["central", "forward", "exact"])
def test_a_step_in_pieces_measures_what_a_step_of_one_pass_does(difference: str) -> None:
    changes = []
    for pieces in ({}, {"mlp_chunk_tokens": 16, "fuse_signs": False}):
        config = run_config(difference=difference, load_in_4bit=True, **pieces)
        model = tiny_model("llama", difference=difference, load_in_4bit=True)
        settle(model, config)
        model.context.mlp_chunk_tokens = 3 if pieces else None
        learner = Learner(model.branches, config)
        batch = tiny_batch(5)
        find_bases(model, [batch], config)
        learner.open_window()
        agzo_step(model, [batch], learner, step=1, mu=0.05, config=config, goal=goal_of(config))
        changes.append([branch.learned().dense() for branch in model.branches])
    assert max(relative_error(a, b) for a, b in zip(*changes, strict=True)) < 1e-3


def test_bases_found_in_pieces_are_those_of_the_whole() -> None:
    bases = []
    for size in (None, 3):
        config, model = run_config(), tiny_model("llama")
        model.context.mlp_chunk_tokens = size
        find_bases(model, [tiny_batch(5)], config)
        bases.append([group.basis for group in model.groups] + [torch.tensor([b.scale for b in model.branches])])
    for whole, pieces in zip(*bases, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-3)
