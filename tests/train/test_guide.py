"""Noise guided by the errors at the head: against dense references, and what it leaves untouched."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    dense_reference,
    run_config,
    teach_at_random,
    tiny_batch,
    tiny_checkpoint,
    tiny_micro_batches,
    tiny_model,
)
from torch import Tensor
from torch.testing import assert_close

from agzo_edge.config import RunConfig
from agzo_edge.errors import ConfigError, ModelError
from agzo_edge.model.load import load_model
from agzo_edge.model.passes import Refresh
from agzo_edge.model.runtime import EdgeModel, require_guidable
from agzo_edge.numerics.noise import FLOOR
from agzo_edge.train.data import Batch
from agzo_edge.train.goal import goal_of
from agzo_edge.train.guide import find_guides
from agzo_edge.train.learner import Learner
from agzo_edge.train.objective import GOALS, Goal
from agzo_edge.train.preference import PreferenceGoal
from agzo_edge.train.step import agzo_step, begin_window, find_window

GUIDED = {"guide": "head", "rank": 3}


def guided(family: str = "llama", **settings: Any) -> tuple[EdgeModel, Batch, RunConfig]:
    """A model that has learned something, with the bases and guides of a batch."""
    config = run_config(**{**GUIDED, **settings})
    model = load_model(tiny_checkpoint(family), config)
    batch = tiny_batch(4, options=1 if config.objective == "lm" else 4)
    teach_at_random(model)
    find_window(model, [batch], config, goal=goal_of(config))
    return model, batch, config


def find_guides_again(model: EdgeModel, batches: list[Batch], goal: Goal) -> None:
    """The guides of these batches in the bases that the model has."""
    bases = {group.index: group.basis for group in model.groups}
    find_guides(model, batches, goal, memory=0.0, old_bases=bases, refresh=Refresh.NONE)


def guides_of(model: EdgeModel) -> list[Tensor]:
    return [branch.guide for branch in model.branches if branch.guide is not None]


def unit(direction: Tensor) -> Tensor:
    return direction / direction.square().mean().sqrt()


def dense_guesses(model: EdgeModel, batch: Batch) -> dict[str, Tensor]:  # (out_features, rank)
    """Qᵀ H A by layer, each column by the size of H A's: Q from back-propagation to what the last norm reads."""
    plain = dense_reference(model, lambda branch: branch.learned().dense())
    last = plain.get_submodule(next(n for n, m in model.network.named_modules() if m is model.last_module))
    read: dict[str, Tensor] = {}
    last.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), read.update(end=args[0]))[0])
    for branch in model.branches:
        plain.get_submodule(branch.name).register_forward_pre_hook(
            lambda _, args, name=branch.name: read.update({name: args[0].detach()})
        )
    logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    loss = torch.zeros(())
    for row, is_label in enumerate(batch.is_label):
        places = is_label.nonzero().flatten()
        loss = loss - batch.weights[row] * logits[row, places - 1, batch.input_ids[row, places]].mean()
    loss.backward()
    error = read["end"].grad
    rows, tokens, _ = error.shape  # OPT's MLP is given both in one dimension
    guesses = {}
    for branch in model.branches:
        coordinates = read[branch.name].view(rows, tokens, -1) @ branch.group.basis
        energies = coordinates[batch.is_predicting].square().sum(0)
        guess = torch.einsum("bto,btr->or", error, coordinates)
        guesses[branch.name] = guess / (energies + FLOOR * energies.max()).sqrt()
    return guesses


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "neox", "opt"])
def test_a_guide_is_the_direction_of_the_guessed_gradient(family: str) -> None:
    model, batch, _ = guided(family)
    for branch in model.branches:
        assert branch.guide is not None  # by default only such layers are trained
        assert_close(branch.guide, unit(dense_guesses(model, batch)[branch.name]), rtol=0, atol=2e-3)


def test_a_guide_remembers_the_one_before_as_the_new_basis_sees_it() -> None:
    model, _, config = guided()
    before = [(branch.guide, branch.group.basis) for branch in model.branches]
    other = tiny_batch(4, seed=5)
    config = config.model_copy(update={"guide_memory": 0.6})
    find_window(model, [other], config, goal=goal_of(config))
    for branch, (guide, basis) in zip(model.branches, before, strict=True):
        assert branch.guide is not None
        assert guide is not None
        there = guide @ basis.T @ branch.group.basis
        mixed = 0.6 * unit(there) + 0.4 * unit(dense_guesses(model, other)[branch.name])
        assert_close(branch.guide, unit(mixed), rtol=0, atol=2e-3)


def test_no_block_is_part_of_a_graph() -> None:
    model, batch, _ = guided()
    tracked = []
    for layer in model.layers.values():
        layer.register_forward_hook(lambda _module, _args, output: tracked.append(output.requires_grad))
    find_guides_again(model, [batch], GOALS["lm"])
    assert tracked
    assert not any(tracked)


def test_one_plain_pass_finds_bases_and_guides() -> None:
    config = run_config(**GUIDED)
    model, batch = load_model(tiny_checkpoint("llama"), config), tiny_batch(4)
    passes = []
    model.network.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert begin_window(model, [batch], config, goal=goal_of(config)) is Refresh.NONE
    assert len(passes) == 1
    apart = load_model(tiny_checkpoint("llama"), config)
    find_window(apart, [batch], config, goal=goal_of(config))
    for ours, theirs in zip(model.branches, apart.branches, strict=True):
        assert ours.scale == pytest.approx(theirs.scale, rel=1e-4)
        assert ours.guide is not None
        assert theirs.guide is not None
        assert_close(ours.guide, theirs.guide, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"load_in_4bit": True}, {"load_in_8bit": True}, {"mlp_chunk_tokens": 16}, {"logits_chunk": 4 * 300 * 3}],
    ids=str,
)
def test_the_same_batch_gives_the_same_guides_bit_for_bit(settings: dict[str, Any]) -> None:
    (first, _, _), (again, _, _) = guided(**settings), guided(**settings)
    assert all(torch.equal(a, b) for a, b in zip(guides_of(first), guides_of(again), strict=True))


def test_pieces_of_the_logits_and_of_the_mlp_and_of_the_batch_change_a_guide_by_its_rounding() -> None:
    model, _, _ = guided()
    whole = guides_of(model)
    pieces, _, _ = guided(mlp_chunk_tokens=16, logits_chunk=4 * 300 * 3)
    for expected, got in zip(whole, guides_of(pieces), strict=True):
        assert_close(got, expected, rtol=0, atol=1e-3)
    find_guides_again(model, tiny_micro_batches(4, 2), GOALS["lm"])
    for expected, got in zip(whole, guides_of(model), strict=True):
        assert_close(got, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("objective", ["choice", "dpo"])
def test_objectives_with_several_rows_guide_too(objective: str) -> None:
    if objective == "choice":
        model, batch, _ = guided(objective="choice")
        goal: Any = GOALS["choice"]
    else:
        model, _, _ = guided()
        batch, goal = pairs(), PreferenceGoal("dpo", 0.1)
    before = [guide.clone() for guide in guides_of(model)]
    find_guides_again(model, [batch], goal)
    for old, guide in zip(before, guides_of(model), strict=True):
        assert float(guide.square().mean()) == pytest.approx(1.0, rel=1e-5)
        assert objective == "choice" or not torch.equal(old, guide)


def pairs() -> Batch:
    """Two pairs of answers."""
    batch = tiny_batch(4)
    example = torch.tensor([0, 0, 1, 1])
    return replace(
        batch,
        example=example,
        answer=torch.zeros(2, dtype=torch.int64),
        weights=torch.full((2,), 0.5),
        places=batch.places[:2],
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fuse_signs": False},
        {"difference": "forward"},
        {"difference": "exact"},
        {"directions": "shared"},
        {"noise": "gaussian"},
        {"objective": "choice"},
        {"target": "dequantized"},
        {"mlp_chunk_tokens": 16},
        {"offload": "layers"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_guided_steps_lower_the_loss_in_every_setting(settings: dict[str, Any]) -> None:
    config = run_config(**{**GUIDED, "learning_rate": 0.3, "refresh_every": 5, "max_steps": 30, **settings})
    model = load_model(tiny_checkpoint("llama"), config)
    learner = Learner(model.branches, config)
    batches = tiny_micro_batches(6, 6, options=1 if config.objective == "lm" else 3)
    mu = 0.1 if config.dtype == "bfloat16" else 0.01
    losses = [
        agzo_step(model, batches, learner, step=step, mu=mu, config=config, goal=goal_of(config)).loss
        for step in range(config.max_steps)
    ]
    assert losses[-1] < 0.9 * losses[0]


def test_only_layers_that_write_to_the_residual_stream_are_trained_unless_others_are_named() -> None:
    assert {branch.name.rpartition(".")[2] for branch in guided()[0].branches} == {"o_proj", "down_proj"}
    named = tiny_model(**GUIDED, target_modules=("v_proj", "down_proj"))
    assert {branch.name.rpartition(".")[2]: branch.guide is not None for branch in named.branches} == {
        "v_proj": False,
        "down_proj": True,
    }


def test_what_cannot_be_guided_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="residual stream: use --guide none"):
        tiny_model(**GUIDED, target_modules=("v_proj",))
    model = tiny_model(**GUIDED)
    model.last_module = model.network.base_model.layers[-1]  # as of a model that ends without a norm
    with pytest.raises(ModelError, match="last norm: use --guide none"):
        require_guidable(model)
    with pytest.raises(ConfigError, match="a derivative, which a reward has not"):
        run_config(**GUIDED, objective="reward", reward="exact_match")
