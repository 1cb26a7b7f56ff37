"""The side-branch, against a dense model whose weights were changed."""

import pytest
import torch
from helpers import (
    FAMILIES,
    dense_reference,
    model_logits,
    reference_logits,
    teach_at_random,
    tiny_batch,
    tiny_model,
)
from torch import Tensor
from torch.testing import assert_close

from agzo_edge.model.branch import Branch
from agzo_edge.model.passes import Perturbation
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.noise import Noise, draw_noise
from agzo_edge.train.data import Batch
from agzo_edge.train.objective import GOALS, loss_of

MU = 0.01


def noise_of(branch: Branch) -> Noise:
    return draw_noise("sign", (2, *branch.c.shape), seed=1, step=0, layer=branch.index, first_example=0)


def perturbed_logits(model: EdgeModel, batch: Batch, *steps: float) -> Tensor:  # (streams, rows, tokens, vocab)
    perturbation = Perturbation(noise_of=noise_of, example=torch.tensor([0, 1, 1]), steps=steps)
    n = len(steps)
    with torch.no_grad(), model.context.running(mask=batch.attention_mask.bool(), perturbation=perturbation):
        hidden = model.hidden_states(batch.input_ids.repeat(n, 1))
        return model.logits(hidden).unflatten(0, (n, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_signs_in_one_pass_are_the_dense_perturbation_of_each_row(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(3)
    teach_at_random(model)
    for branch in model.branches:
        branch.scale = 1.0 + 0.1 * branch.index
    fused = perturbed_logits(model, batch, MU, -MU)
    for stream, sign in enumerate((1, -1)):
        for row, example in enumerate((0, 1, 1)):
            dense = dense_reference(
                model,
                lambda b, sign=sign, example=example: (
                    b.learned().dense() + sign * MU * b.scale * noise_of(b).dense()[example] @ b.group.basis.T
                ),
            )
            valid = batch.attention_mask[row].bool()
            expected = reference_logits(dense, batch)[row, valid]
            assert_close(fused[stream, row, valid], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_both_signs_in_one_pass_equal_two_passes(family: str) -> None:
    model, batch = tiny_model(family, load_in_4bit=True), tiny_batch(3)
    fused = perturbed_logits(model, batch, MU, -MU)
    apart = torch.cat([perturbed_logits(model, batch, MU), perturbed_logits(model, batch, -MU)])
    assert_close(fused, apart, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fused[0], fused[1], atol=1e-3)


def test_a_stream_with_step_zero_is_the_plain_model() -> None:
    model, batch = tiny_model(), tiny_batch(3)
    assert_close(perturbed_logits(model, batch, MU, 0.0)[1], model_logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_learned_change_is_the_dense_change(family: str) -> None:
    model, batch = tiny_model(family, load_in_4bit=True), tiny_batch(3)
    untaught = model_logits(model, batch)
    teach_at_random(model)
    valid = batch.attention_mask.bool()
    taught = model_logits(model, batch)[valid]
    expected = reference_logits(dense_reference(model, lambda b: b.learned().dense()), batch)[valid]
    assert_close(taught, expected, rtol=1e-4, atol=2e-4)
    assert float((taught - untaught[valid]).abs().max()) > 0.05


def test_after_an_error_inside_a_pass_the_model_is_plain_again() -> None:
    model, batch = tiny_model(), tiny_batch(3)
    before = model_logits(model, batch)
    perturbation = Perturbation(noise_of=noise_of, example=torch.tensor([0, 1, 7]), steps=(MU,))
    with pytest.raises(IndexError):  # the noise of example 7 does not exist
        loss_of(model, batch, goal=GOALS["lm"], perturbation=perturbation)
    assert torch.equal(model_logits(model, batch), before)
