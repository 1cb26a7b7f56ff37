"""What a pass tells its layers, and what padding must not do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, teach_at_random, tiny_batch, tiny_model
from torch import Tensor
from torch.testing import assert_close

from agzo_edge.model.passes import Perturbation, Refresh
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.basis import activation_basis, starting_basis
from agzo_edge.numerics.noise import draw_noise
from agzo_edge.train.data import Batch
from agzo_edge.train.objective import GOALS, loss_of


def perturbation(batch: Batch, *steps: float) -> Perturbation:
    n = batch.answer.shape[0]
    return Perturbation(
        noise_of=lambda b: draw_noise("sign", (n, *b.c.shape), seed=0, step=0, layer=b.index, first_example=0),
        example=batch.example,
        steps=steps,
    )


def padded(batch: Batch, n_tokens: int) -> Batch:
    def wider(x: Tensor, value: int) -> Tensor:
        return F.pad(x, (0, n_tokens), value=value)

    return replace(
        batch,
        input_ids=wider(batch.input_ids, 7),
        attention_mask=wider(batch.attention_mask, 0),
        is_label=wider(batch.is_label, False),
    )


def captured(model: EdgeModel, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """The valid tokens' input and output of each layer in a plain pass."""
    seen = {}
    mask = batch.attention_mask.bool()

    def keep(name: str, x: Tensor, y: Tensor) -> None:
        seen[name] = (x.view(*mask.shape, -1)[mask], y.view(*mask.shape, -1)[mask])

    hooks = [
        layer.register_forward_hook(lambda _m, args, y, name=name: keep(name, args[0], y))
        for name, layer in model.layers.items()
    ]
    loss_of(model, batch, goal=GOALS["lm"])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refresh_finds_the_basis_and_scale_of_the_unperturbed_layer(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(4)
    teach_at_random(model)
    for branch in model.branches:  # a window ends before the next basis is found
        branch.fold(keep_rank=99, random_bits=lambda: torch.zeros(0))
    seen = captured(model, batch)
    loss_of(model, batch, goal=GOALS["lm"], perturbation=perturbation(batch, 0.01, 0.0), refresh=Refresh.IN_PASS)
    for branch in model.branches:
        x, y = seen[branch.name]
        start = starting_basis(branch.group.in_features, 4)
        assert_close(branch.group.basis, activation_basis(x, start), rtol=0, atol=2e-3)
        rms = y.square().mean().sqrt() / (x @ branch.group.basis).square().sum(1).mean().sqrt()
        assert branch.scale == pytest.approx(float(rms), rel=1e-3)


def test_both_signs_average_to_the_unperturbed_basis_up_to_the_square_of_mu() -> None:
    errors = []
    for mu in (0.02, 0.01):
        model, batch = tiny_model(), tiny_batch(4)
        seen = captured(model, batch)
        loss_of(model, batch, goal=GOALS["lm"], perturbation=perturbation(batch, mu, -mu), refresh=Refresh.IN_PASS)
        last = model.branches[-1]
        exact = activation_basis(seen[last.name][0], starting_basis(last.group.in_features, 4))
        errors.append(float((last.group.basis - exact).norm()))
    assert errors[0] == pytest.approx(4 * errors[1], rel=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_losses_nor_bases_nor_scales(family: str) -> None:
    batch = tiny_batch(4)
    results = []
    for version in (batch, padded(batch, 9)):
        model = tiny_model(family)
        losses = loss_of(
            model,
            version,
            goal=GOALS["lm"],
            perturbation=perturbation(batch, 0.01, -0.01),
            refresh=Refresh.IN_PASS,
        )
        results.append((losses, [b.group.basis for b in model.branches], [b.scale for b in model.branches]))
    assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    assert_close(results[0][1], results[1][1], rtol=0, atol=2e-3)
    assert_close(results[0][2], results[1][2], rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_loss_does_not_depend_on_the_rows_beside_it(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(5)
    together = loss_of(model, batch, goal=GOALS["lm"])[0]
    for row in range(5):
        n_tokens = int(batch.attention_mask[row].sum())
        alone = replace(
            batch,
            input_ids=batch.input_ids[row : row + 1, :n_tokens],
            attention_mask=batch.attention_mask[row : row + 1, :n_tokens],
            is_label=batch.is_label[row : row + 1, :n_tokens],
            predicts=torch.stack(batch.is_label[row : row + 1, 1:n_tokens].nonzero(as_tuple=True)),
            example=torch.tensor([0]),
            answer=torch.tensor([0]),
        )
        assert_close(loss_of(model, alone, goal=GOALS["lm"])[0, 0], together[row], rtol=1e-4, atol=1e-4)


def test_without_relative_perturbation_scales_stay_one() -> None:
    model, batch = tiny_model(relative=False), tiny_batch(3)
    loss_of(model, batch, goal=GOALS["lm"], perturbation=perturbation(batch, 0.01, 0.0), refresh=Refresh.IN_PASS)
    assert {branch.scale for branch in model.branches} == {1.0}
    assert not torch.equal(model.branches[0].group.basis, starting_basis(64, 4))


def test_rows_that_are_not_finite_leave_basis_and_scale_as_they_were() -> None:
    model, batch = tiny_model(), tiny_batch(3)
    model.network.get_input_embeddings().weight[batch.input_ids[1, 1]] = torch.inf
    losses = loss_of(
        model, batch, goal=GOALS["lm"], perturbation=perturbation(batch, 0.01, -0.01), refresh=Refresh.IN_PASS
    )
    assert losses.isfinite().tolist() == [[True, False, True]] * 2
    assert {branch.scale for branch in model.branches} == {1.0}
    assert_close(model.branches[0].group.basis, starting_basis(64, 4))
