"""One AGZO step: its estimate against back-propagation, and the whole of it against a dense Algorithm 1."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FAMILIES,
    assert_same_bytes,
    dense_reference,
    relative_error,
    run_config,
    teach_at_random,
    tiny_batch,
    tiny_checkpoint,
    tiny_micro_batches,
    tiny_model,
)
from torch import Tensor
from torch.testing import assert_close

from agzo_edge.config import RunConfig, config_from
from agzo_edge.errors import BudgetBrokenError, NonFiniteLossError
from agzo_edge.model.load import load_model
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.basis import starting_basis
from agzo_edge.numerics.noise import draw_noise
from agzo_edge.train.data import Batch
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import TRUST, Learner
from agzo_edge.train.step import StepRecord, agzo_step, find_bases, find_window, measure

EXACT = {"difference": "exact"}


def label_losses(plain: Any, batch: Batch) -> Tensor:
    """The mean loss of each row by transformers' own model, with a graph."""
    logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    rows = []
    for row, is_label in enumerate(batch.is_label):
        places = is_label.nonzero().flatten()
        rows.append(F.cross_entropy(logits[row, places - 1], batch.input_ids[row, places]))
    return torch.stack(rows)


def objective_losses(plain: Any, batch: Batch, config: RunConfig) -> Tensor:
    losses = label_losses(plain, batch)
    if config.objective == "lm":
        return losses
    scores = [-losses[batch.example == example] for example in range(batch.answer.shape[0])]
    return torch.stack([F.cross_entropy(s, a) for s, a in zip(scores, batch.answer, strict=True)])


def true_derivatives(model: EdgeModel, batch: Batch, config: RunConfig, *, step: int = 0) -> Tensor:
    """sum over layers of <dL_b/dW, s R_b Aᵀ>, by back-propagation through the dense model."""
    plain = dense_reference(model, lambda b: b.learned().dense())
    losses = objective_losses(plain, batch, config)
    derivatives = []
    for example, loss in enumerate(losses):
        plain.zero_grad()
        loss.backward(retain_graph=True)
        total = 0.0
        for branch in model.branches:
            module = plain.get_submodule(branch.name)
            gradient = module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad
            first = 0 if config.directions == "shared" else example
            noise = branch.noise(config.noise, 1, seed=config.seed, step=step, first_example=first).dense()[0]
            total += float((gradient * (branch.scale * noise @ branch.group.basis.T)).sum())
        derivatives.append(total)
    return torch.tensor(derivatives)


def prepared(family: str = "llama", **settings: Any) -> tuple[EdgeModel, Batch, RunConfig]:
    """A model that has learned something, with bases and scales of the batch."""
    config = run_config(**settings)
    model = load_model(tiny_checkpoint(family), config)
    batch = tiny_batch(4, options=1 if config.objective == "lm" else 4)
    teach_at_random(model)
    for branch in model.branches:
        branch.fold(keep_rank=99, random_bits=lambda: torch.zeros(0))
    find_window(model, [batch], config, goal=goal_of(config))
    return model, batch, config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exact_difference_is_back_propagation(family: str) -> None:
    model, batch, config = prepared(family, **EXACT)
    measured, loss = measure(model, [batch], step=3, mu=1.0, config=config, goal=goal_of(config))
    assert relative_error(measured.projected, true_derivatives(model, batch, config, step=3)) < 1e-4
    with torch.no_grad():
        losses = objective_losses(dense_reference(model, lambda b: b.learned().dense()), batch, config)
    assert loss == pytest.approx(float(batch.weights @ losses), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True},
        {"load_in_8bit": True},
        {"noise": "gaussian"},
        {"directions": "shared"},
        {"relative": False},
        {"objective": "choice"},
        {"rank": 1},
        {"target_modules": ("v_proj", "down_proj")},
        {"guide": "head", "noise": "gaussian"},
    ],
    ids=str,
)
def test_the_exact_difference_is_back_propagation_in_every_setting(settings: dict[str, Any]) -> None:
    model, batch, config = prepared("llama", **EXACT, **settings)
    measured, _ = measure(model, [batch], step=3, mu=1.0, config=config, goal=goal_of(config))
    expected = true_derivatives(model, batch, config, step=3)
    if config.directions == "shared":
        assert measured.weights.tolist() == [1.0]
        expected = (batch.weights @ expected).reshape(1)
    assert relative_error(measured.projected, expected) < 1e-4


@pytest.mark.parametrize(("difference", "order"), [("central", 2), ("forward", 1)])
def test_finite_differences_approach_the_derivative_until_rounding(difference: str, order: int) -> None:
    model, batch, config = prepared("qwen3", difference=difference)
    expected = true_derivatives(model, batch, config)

    def error_at(mu: float) -> float:
        return relative_error(
            measure(model, [batch], step=0, mu=mu, config=config, goal=goal_of(config))[0].projected, expected
        )

    large, smaller = error_at(0.02), error_at(0.01)
    assert large / smaller == pytest.approx(2**order, rel=0.35)
    assert min(error_at(mu) for mu in (1e-2, 3e-3, 1e-3)) < 0.02
    assert error_at(1e-6) > 10 * error_at(1e-3)  # only rounding is left


def taught(batches: list[Batch], *, steps: range = range(1), mu: float = 0.05, **settings: Any) -> Learner:
    """The learner after `steps` steps on the same batches."""
    config = run_config(**settings)
    model = load_model(tiny_checkpoint("llama"), config)
    learner = Learner(model.branches, config)
    if steps.start:
        learner.open_window()
    for step in steps:
        agzo_step(model, batches, learner, step=step, mu=mu, config=config, goal=goal_of(config))
    return learner


def distance(a: Learner, b: Learner) -> float:
    """The largest relative distance of two learners' weight changes."""
    pairs = zip(a.branches, b.branches, strict=True)
    return max(relative_error(x.learned().dense(), y.learned().dense()) for x, y in pairs)


@pytest.mark.parametrize("options", [1, 3])
@pytest.mark.parametrize("directions", ["example", "shared"])
@pytest.mark.parametrize("difference", ["exact", "forward", "central"])
def test_micro_batches_give_the_coefficients_of_one_batch(difference: str, directions: str, options: int) -> None:
    settings = {
        "difference": difference,
        "directions": directions,
        "objective": "lm" if options == 1 else "choice",
        "steps": range(1, 2),  # within a window: the basis is fixed
    }
    one = taught([tiny_batch(5, options=options)], **settings)
    parts = taught(tiny_micro_batches(5, 2, options=options), **settings)
    assert distance(parts, one) < (1e-5 if difference == "exact" else 5e-5)


@pytest.mark.parametrize("difference", ["exact", "forward"])
def test_micro_batches_find_the_basis_of_one_batch(difference: str) -> None:
    one = taught([tiny_batch(5)], difference=difference)
    parts = taught(tiny_micro_batches(5, 2), difference=difference)
    for a, b in zip(one.branches, parts.branches, strict=True):
        assert_close(a.group.basis, b.group.basis, rtol=0, atol=1e-3)
        assert a.scale == pytest.approx(b.scale, rel=1e-4)
    assert distance(parts, one) < 1e-3


def test_on_a_refresh_step_central_micro_batches_differ_by_the_square_of_mu() -> None:
    # One batch finds its basis inside the perturbed pass, from the mean of both signs; parts find it before.
    distances = [
        distance(taught(tiny_micro_batches(5, 2), mu=mu), taught([tiny_batch(5)], mu=mu)) for mu in (0.04, 0.02)
    ]
    assert distances[1] < 0.1
    assert distances[0] / distances[1] == pytest.approx(4, rel=0.4)


class DenseAlgorithm1:
    """AGZO as its paper writes it: weights changed in place, one shared direction, forward difference.

    Source: arXiv 2601.17261, Algorithm 1, rank 1, three steps of power iteration.
    """

    def __init__(self, plain: Any, names: list[str], *, seed: int, mu: float, learning_rate: float) -> None:
        self.plain, self.names = plain, names
        self.seed, self.mu, self.learning_rate = seed, mu, learning_rate
        self.bases = {name: starting_basis(self.weight(name).shape[1], 1) for name in names}

    def weight(self, name: str) -> Tensor:
        weight: Tensor = self.plain.get_submodule(name).weight.data
        return weight

    @torch.no_grad()
    def step(self, batch: Batch, step: int) -> float:
        inputs: dict[str, Tensor] = {}
        mask = batch.attention_mask.bool()
        hooks = [
            self.plain.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, name=name: inputs.__setitem__(name, args[0][mask])
            )
            for name in self.names
        ]
        before = float(batch.weights @ label_losses(self.plain, batch))
        for hook in hooks:
            hook.remove()
        directions = {name: self.direction(name, inputs[name], index, step) for index, name in enumerate(self.names)}
        for name in self.names:
            self.weight(name).add_(directions[name], alpha=self.mu)
        after = float(batch.weights @ label_losses(self.plain, batch))
        projected = (after - before) / self.mu
        for name in self.names:
            self.weight(name).sub_(directions[name], alpha=self.mu)
            self.weight(name).sub_(directions[name], alpha=self.learning_rate * projected)
        return projected

    def direction(self, name: str, inputs: Tensor, index: int, step: int) -> Tensor:
        basis = self.bases[name]
        for _ in range(3):
            basis = inputs.T @ (inputs @ basis)
            basis /= basis.norm()
        self.bases[name] = basis
        shape = (1, self.weight(name).shape[0], 1)
        noise = draw_noise("gaussian", shape, seed=self.seed, step=step, layer=index, first_example=0).dense()[0]
        return noise @ basis.T


def test_the_paper_preset_is_algorithm_1_done_densely() -> None:
    settings = {"mu": 0.003, "learning_rate": 3e-4, "seed": 5}
    config = config_from({"device": "cpu", "dtype": "float32", "load_in_4bit": False, **settings}, preset="paper")
    model = load_model(tiny_checkpoint("llama"), config)
    plain = dense_reference(model)
    original = copy.deepcopy(plain)
    dense = DenseAlgorithm1(plain, [branch.name for branch in model.branches], **settings)
    learner = Learner(model.branches, config)
    for step in range(3):
        batch = tiny_batch(4, seed=step)
        record = agzo_step(model, [batch], learner, step=step, mu=config.mu, config=config, goal=goal_of(config))
        assert len(record.projected) == 1
        assert record.projected[0] == pytest.approx(dense.step(batch, step), rel=5e-3)
    for branch in model.branches:
        change = dense.weight(branch.name) - original.get_submodule(branch.name).weight.data
        assert relative_error(branch.learned().dense(), change) < 5e-3


def trained(
    model: EdgeModel,
    config: RunConfig,
    *,
    steps: int,
    after: Callable[[Learner, StepRecord], None] | None = None,
) -> tuple[Learner, list[StepRecord]]:
    learner = Learner(model.branches, config)
    records = []
    batch = tiny_batch(8)
    mu = 0.01 if config.mu == "auto" else config.mu
    for step in range(steps):
        records.append(agzo_step(model, [batch], learner, step=step, mu=mu, config=config, goal=goal_of(config)))
        if after is not None:
            after(learner, records[-1])
    return learner, records


def test_windows_fold_into_exactly_the_sum_of_what_each_step_learned() -> None:
    model = tiny_model(refresh_every=2, adapter_rank=64)
    config = run_config(refresh_every=2, adapter_rank=64)
    totals = {branch.name: torch.zeros(branch.shape) for branch in model.branches}
    last = {branch.name: torch.zeros_like(branch.c) for branch in model.branches}

    def check(learner: Learner, record: StepRecord) -> None:
        for branch in learner.branches:
            if record.step % 2 == 0:
                last[branch.name] = torch.zeros_like(branch.c)
            totals[branch.name] += (branch.c - last[branch.name]) @ branch.group.basis.T
            last[branch.name] = branch.c.clone()
            assert_close(branch.learned().dense(), totals[branch.name], rtol=1e-4, atol=1e-6)
            assert branch.folded.rank == 4 * (record.step // 2)

    trained(model, config, steps=7, after=check)


def test_the_rank_stays_bounded_and_what_is_left_out_is_recorded() -> None:
    settings = {"refresh_every": 1, "rank": 2, "adapter_rank": 4}
    model, config = tiny_model(**settings), run_config(**settings)
    learner, records = trained(
        model,
        config,
        steps=12,
        after=lambda learner, _: [pytest.fail("too wide") for b in learner.branches if b.folded.rank > 8],
    )
    assert {pair.rank for pair in learner.adapter().values()} == {4}
    shares = [record.left_out for record in records]
    assert all(share is not None and 0 <= share < 1 for share in shares)
    assert any(share for share in shares)


def test_a_step_inside_a_window_leaves_basis_and_scale_alone() -> None:
    model, config = tiny_model(), run_config()
    seen: list[list[Any]] = []
    trained(
        model,
        config,
        steps=3,
        after=lambda learner, _: seen.append([(b.group.basis.clone(), b.scale) for b in learner.branches]),
    )
    for window in seen[1:]:
        for (basis, scale), (first_basis, first_scale) in zip(window, seen[0], strict=True):
            assert torch.equal(basis, first_basis)
            assert scale == first_scale


LEARNING = {
    "default": ({}, "default"),
    "exact": (EXACT, "default"),
    "forward": ({"difference": "forward"}, "default"),
    "gaussian": ({"noise": "gaussian"}, "default"),
    "shared": ({"directions": "shared", "learning_rate": 0.02}, "default"),
    "momentum": ({"optimizer": "momentum", "learning_rate": 0.02}, "default"),
    "adam": ({"optimizer": "adam", "learning_rate": 0.05}, "default"),
    "sign": ({"optimizer": "sign", "learning_rate": 0.02}, "default"),
    "every step": ({"refresh_every": 1}, "default"),
    "one basis": ({"refresh_every": 0}, "default"),
    "cosine": ({"lr_schedule": "cosine", "warmup_steps": 5, "max_steps": 40}, "default"),
    "4 bit": ({"load_in_4bit": True}, "default"),
    "dequantized": ({"load_in_4bit": True, "target": "dequantized", "refresh_every": 5}, "default"),
    "paper": ({"learning_rate": 3e-3}, "paper"),
}


@pytest.mark.parametrize("case", LEARNING)
def test_the_loss_falls(case: str) -> None:
    settings, preset = LEARNING[case]
    base = {"device": "cpu", "dtype": "float32", "load_in_4bit": False}
    config = config_from(base, settings, preset=preset)
    model = load_model(tiny_checkpoint("llama"), config)
    _, records = trained(model, config, steps=40)
    losses = [record.loss for record in records]
    share = 0.99 if preset == "paper" else 0.95  # the paper's form has one direction for all eight examples
    assert sum(losses[-5:]) / 5 < share * losses[0]


@pytest.mark.parametrize("width", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_thirty_steps_leave_every_byte_of_the_base(width: dict[str, bool]) -> None:
    assert_base_survives(30, width)


@pytest.mark.slow
@pytest.mark.parametrize("width", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_thousand_steps_leave_every_byte_of_the_base(width: dict[str, bool]) -> None:
    assert_base_survives(1000, width)


def assert_base_survives(steps: int, width: dict[str, bool]) -> None:
    config = run_config(**width, optimizer="momentum", learning_rate=0.01)
    model = load_model(tiny_checkpoint("gpt2"), config)
    before = model.base_sha256()
    learner, _ = trained(model, config, steps=steps)
    assert all(branch.learned().dense().any() for branch in learner.branches)
    assert model.base_sha256() == before


@pytest.mark.parametrize("micro_batch_size", [4, 2])
@pytest.mark.parametrize("refresh_every", [25, 2])
def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(micro_batch_size: int, refresh_every: int) -> None:
    settings = {"refresh_every": refresh_every, "optimizer": "momentum"}
    model, config = tiny_model(**settings), run_config(**settings)
    batches = tiny_micro_batches(4, micro_batch_size)
    learner = Learner(model.branches, config)
    for step in range(2):
        agzo_step(model, batches, learner, step=step, mu=0.01, config=config, goal=goal_of(config))
    bad = tiny_batch(4).input_ids[2, 3]
    assert [bool((row == bad).any()) for row in tiny_batch(4).input_ids] == [False, False, True, False]
    kept = model.network.get_input_embeddings().weight[bad].clone()
    before = learner.state()
    model.network.get_input_embeddings().weight[bad] = math.nan
    with pytest.raises(
        NonFiniteLossError, match=r"step 3: the loss of notes\.jsonl:3 is not finite.*new run.*--adapter"
    ):
        agzo_step(model, batches, learner, step=2, mu=0.01, config=config, goal=goal_of(config))
    after = learner.state()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    model.network.get_input_embeddings().weight[bad] = kept
    again = agzo_step(model, batches, learner, step=2, mu=0.01, config=config, goal=goal_of(config))
    assert math.isfinite(again.loss)


def test_an_error_after_a_window_was_written_into_held_weights_neither_loses_nor_doubles_it() -> None:
    settings = {"target": "dequantized", "refresh_every": 2}
    model, config = tiny_model(**settings), run_config(**settings)
    learner, _ = trained(model, config, steps=2)
    before = {branch.name: branch.held.change() + branch.learned().dense() for branch in learner.branches}
    model.network.get_input_embeddings().weight[tiny_batch(8).input_ids[0, 1]] = math.nan
    for _ in range(2):
        with pytest.raises(NonFiniteLossError):
            agzo_step(model, [tiny_batch(8)], learner, step=2, mu=0.01, config=config, goal=goal_of(config))
    for branch in learner.branches:
        assert_close(branch.held.change() + branch.learned().dense(), before[branch.name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_step_whose_update_met_the_limit_is_the_same_step_when_taken_again(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned(*, scarce_at: int | None) -> tuple[list[StepRecord], Learner]:
        model, batch, config = prepared(guide="head", refresh_every=2, optimizer=optimizer, adapter_rank=1)
        learner, records = Learner(model.branches, config), []
        for step in range(5):
            if step == scarce_at:
                with monkeypatch.context() as patched:
                    patched.setattr("agzo_edge.train.learner.gradient_estimate", no_memory)
                    with pytest.raises(BudgetBrokenError):
                        agzo_step(model, [batch], learner, step=step, mu=0.01, config=config, goal=goal_of(config))
            records.append(agzo_step(model, [batch], learner, step=step, mu=0.01, config=config, goal=goal_of(config)))
        return records, learner

    def no_memory(*_arguments: object) -> Tensor:
        raise BudgetBrokenError("no memory for the update")

    records, learner = learned(scarce_at=None)
    for scarce_at in (3, 4):  # within a window, and where one begins
        again, retried = learned(scarce_at=scarce_at)
        assert again == records
        assert_same_bytes(retried.state(), learner.state())


def test_a_search_for_bases_that_was_broken_off_leaves_nothing_in_the_next_one() -> None:
    config = run_config()
    whole, broken = tiny_model(), tiny_model()
    batches = tiny_micro_batches(4, 2)
    outside = replace(batches[1], input_ids=batches[1].input_ids + 10_000)
    with pytest.raises(IndexError):
        find_bases(broken, [batches[0], outside], config)
    for model in (whole, broken):
        find_bases(model, batches, config)
    for a, b in zip(whole.branches, broken.branches, strict=True):
        assert torch.equal(a.group.basis, b.group.basis)
        assert a.scale == b.scale


def test_the_same_run_gives_the_same_bytes_and_another_seed_others() -> None:
    states = [taught([tiny_batch(4)], steps=range(3), seed=seed).state() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["c.0"], states[2]["c.0"])


def test_a_rate_that_would_change_more_than_a_quarter_of_the_loss_is_not_taken() -> None:
    config = run_config(**EXACT, learning_rate=1e3)
    model = tiny_model(**EXACT)
    record = agzo_step(
        model, [tiny_batch(4)], Learner(model.branches, config), step=0, mu=0.5, config=config, goal=goal_of(config)
    )
    steepness = torch.tensor(record.projected).square().mean().sqrt()
    assert record.learning_rate == pytest.approx(TRUST * record.loss / float(steepness), rel=1e-5)


def test_a_record_tells_the_loss_and_what_the_step_used() -> None:
    config = run_config(**EXACT, warmup_steps=3)
    model, batch = tiny_model(**EXACT), tiny_batch(4)
    learner = Learner(model.branches, config)
    with torch.no_grad():
        expected = objective_losses(dense_reference(model), batch, config)
    record = agzo_step(model, [batch], learner, step=0, mu=0.5, config=config, goal=goal_of(config))
    assert record.loss == pytest.approx(float(batch.weights @ expected), rel=1e-5)
    assert record.learning_rate == pytest.approx(0.1 / 4)
    assert record.label_tokens == int(batch.is_label.sum())
    assert (record.step, record.mu, record.left_out) == (0, 0.5, 0.0)
    assert len(record.projected) == len(record.weights) == 4
