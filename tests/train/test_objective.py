"""From a batch to losses, against transformers and torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, dense_reference, reference_logits, tiny_batch, tiny_micro_batches, tiny_model
from torch import Tensor
from torch.testing import assert_close

from agzo_edge.model.passes import Perturbation
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.noise import draw_noise
from agzo_edge.train.data import Batch
from agzo_edge.train.objective import GOALS, loss_of


def row_losses(model: EdgeModel, batch: Batch) -> Tensor:
    """The mean cross-entropy of each row's label tokens, by the plain model."""
    logits = reference_logits(dense_reference(model), batch)
    means = []
    for row, is_label in enumerate(batch.is_label):
        places = is_label.nonzero().flatten()
        means.append(F.cross_entropy(logits[row, places - 1], batch.input_ids[row, places]))
    return torch.stack(means)


def perturbation(batch: Batch, *steps: float, exact: bool = False) -> Perturbation:
    n = batch.answer.shape[0]
    return Perturbation(
        noise_of=lambda b: draw_noise("sign", (n, *b.c.shape), seed=0, step=0, layer=b.index, first_example=0),
        example=batch.example,
        steps=steps,
        exact=exact,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_lm_loss_is_the_mean_cross_entropy_of_the_label_tokens(family: str) -> None:
    model, batch = tiny_model(family, load_in_4bit=True), tiny_batch(5)
    losses = loss_of(model, batch, goal=GOALS["lm"])
    assert losses.shape == (1, 5)
    assert losses.dtype is torch.float32
    assert_close(losses[0], row_losses(model, batch), rtol=1e-4, atol=1e-4)


def test_a_choice_loss_is_the_cross_entropy_of_the_options_mean_log_likelihoods() -> None:
    model, batch = tiny_model(), tiny_batch(5, options=4)
    scores = -row_losses(model, batch)
    assert torch.bincount(batch.example).unique().numel() > 1  # differing numbers of options
    expected = [F.cross_entropy(scores[batch.example == example], batch.answer[example]) for example in range(5)]
    assert_close(loss_of(model, batch, goal=GOALS["choice"])[0], torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [1, 3])
def test_the_size_of_a_logits_chunk_does_not_matter(options: int) -> None:
    model, batch = tiny_model(), tiny_batch(4, options=options)
    objective = "lm" if options == 1 else "choice"
    steps = perturbation(batch, 0.01, -0.01)
    whole = loss_of(model, batch, goal=GOALS[objective], perturbation=steps)
    model.logits_chunk_bytes = 1
    assert_close(loss_of(model, batch, goal=GOALS[objective], perturbation=steps), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [1, 3])
def test_micro_batches_weigh_up_to_the_whole_batch(options: int) -> None:
    model, batch = tiny_model(), tiny_batch(5, options=options)
    objective = "lm" if options == 1 else "choice"
    parts = tiny_micro_batches(5, 2, options=options)
    total = sum(float(part.weights @ loss_of(model, part, goal=GOALS[objective])[0]) for part in parts)
    assert total == pytest.approx(float(batch.weights @ loss_of(model, batch, goal=GOALS[objective])[0]), rel=1e-5)


@pytest.mark.parametrize("options", [1, 4])
def test_the_exact_mode_gives_the_loss_and_the_limit_of_the_central_difference(options: int) -> None:
    model, batch = tiny_model(), tiny_batch(4, options=options)
    objective = "lm" if options == 1 else "choice"
    value, derivative = loss_of(model, batch, goal=GOALS[objective], perturbation=perturbation(batch, 1.0, exact=True))
    assert_close(value, loss_of(model, batch, goal=GOALS[objective])[0], rtol=1e-4, atol=1e-4)
    mu = 1e-3
    plus, minus = loss_of(model, batch, goal=GOALS[objective], perturbation=perturbation(batch, mu, -mu))
    assert_close((plus - minus) / (2 * mu), derivative, rtol=0.02, atol=0.02)


def test_no_graph_is_kept_even_when_gradients_are_on() -> None:
    model, batch = tiny_model(), tiny_batch(2)
    model.network.requires_grad_(True)
    assert not loss_of(model, batch, goal=GOALS["lm"]).requires_grad


def test_the_same_pass_gives_the_same_bytes() -> None:
    model, batch = tiny_model(load_in_4bit=True), tiny_batch(3)
    steps = perturbation(batch, 0.01, -0.01)
    first, second = (loss_of(model, batch, goal=GOALS["lm"], perturbation=steps) for _ in range(2))
    assert torch.equal(first, second)
