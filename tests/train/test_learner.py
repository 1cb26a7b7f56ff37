"""What a step's numbers do to the coefficients."""

import math
from importlib import import_module

import pytest
import torch
from helpers import assert_same_bytes, run_config
from torch.testing import assert_close

from agzo_edge.errors import BudgetBrokenError
from agzo_edge.model.branch import make_branches
from agzo_edge.numerics.noise import draw_noise
from agzo_edge.train.learner import TRUST, Learner, Measurement

WEIGHTS = torch.tensor([0.5, 0.25, 0.25])


def new_learner(**settings: object) -> Learner:
    branches = make_branches([("a", 6, 0), ("b", 5, 0), ("c", 4, 1)], [8, 7], rank=2)
    for branch in branches:
        branch.scale = 0.5 + branch.index
    return Learner(branches, run_config(rank=2, **settings))


def measured(step: int) -> Measurement:
    generator = torch.Generator().manual_seed(step)
    return Measurement(torch.randn(3, generator=generator), WEIGHTS)


def run(learner: Learner, steps: range) -> None:
    """Steps with bases that follow from the step's number alone."""
    for step in steps:
        if learner.window_starts(step):
            learner.close_window(step)
            for group in {id(b.group): b.group for b in learner.branches}.values():
                generator = torch.Generator().manual_seed(100 * step + group.index)
                group.basis = torch.linalg.qr(torch.randn(group.in_features, 2, generator=generator)).Q
            learner.open_window()
        learner.apply(step, measured(step), learning_rate=learner.learning_rate(step))


def test_windows_start_every_so_many_steps_or_once() -> None:
    assert [s for s in range(9) if new_learner(refresh_every=3).window_starts(s)] == [0, 3, 6]
    assert [s for s in range(9) if new_learner(refresh_every=0).window_starts(s)] == [0]
    assert all(new_learner(refresh_every=1).window_starts(s) for s in range(9))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_step_is_the_textbook_one(normalize: bool) -> None:
    learner = new_learner(normalize=normalize, seed=9)
    learner.open_window()
    step = measured(4)
    learner.apply(4, step, learning_rate=0.1)
    spread = float(step.projected.square().mean().sqrt()) if normalize else 1.0
    for branch in learner.branches:
        noise = draw_noise("sign", (3, *branch.c.shape), seed=9, step=4, layer=branch.index, first_example=0)
        estimate = torch.einsum("b,b,bor->or", WEIGHTS, step.projected, noise.dense())
        assert_close(branch.c, -0.1 * branch.scale * estimate / spread)


def test_no_two_layers_and_no_two_steps_share_noise() -> None:
    learner = new_learner(seed=1)
    for branch in learner.branches:
        branch.scale = 1.0
    learner.open_window()
    learner.apply(0, measured(0), learning_rate=1.0)
    a, b = learner.branches[0].c[:5], learner.branches[1].c
    assert not torch.allclose(a, b)
    first = a.clone()
    learner.apply(1, measured(0), learning_rate=1.0)
    assert not torch.allclose(learner.branches[0].c[:5], 2 * first)


def test_a_wild_projected_gradient_is_clipped_at_the_spread_before_it() -> None:
    learner = new_learner(clip=3.0, normalize=False, momentum=0.0)
    learner.open_window()
    for step in range(2):
        learner.apply(step, Measurement(torch.tensor([1.0, -1.0, 1.0]), WEIGHTS), learning_rate=0.1)
    before = [branch.c.clone() for branch in learner.branches]
    learner.apply(2, Measurement(torch.tensor([1000.0, 0.0, 0.0]), WEIGHTS), learning_rate=0.1)
    for branch, old in zip(learner.branches, before, strict=True):
        assert_close((branch.c - old).abs(), torch.full_like(old, 0.1 * branch.scale * 0.5 * 3.0))


def test_the_longest_rate_is_that_of_a_quarter_of_the_loss_by_the_slopes_less_their_outliers() -> None:
    learner = new_learner(clip=2.0)
    learner.open_window()
    steady = Measurement(torch.tensor([8.0, -8.0, 8.0]), WEIGHTS)
    assert learner.longest_rate(steady, loss=2.0) == pytest.approx(TRUST * 2.0 / 8.0)
    learner.apply(0, steady, learning_rate=0.1)
    wild = Measurement(torch.tensor([8.0, -8.0, 8000.0]), WEIGHTS)  # clipped at 16
    assert learner.longest_rate(wild, loss=2.0) == pytest.approx(TRUST * 2.0 / math.sqrt((64 + 64 + 256) / 3))
    assert learner.longest_rate(Measurement(torch.zeros(3), WEIGHTS), loss=2.0) == math.inf
    assert new_learner(normalize=False).longest_rate(steady, loss=2.0) == math.inf
    heavy = new_learner(optimizer="momentum", momentum=0.9)
    assert heavy.longest_rate(steady, loss=2.0) == pytest.approx(0.1 * TRUST * 2.0 / 8.0)


def test_the_schedule_and_what_was_lost_by_going_back_take_the_longest_rate_down_as_well() -> None:
    learner = new_learner(learning_rate=0.1, lr_schedule="linear", max_steps=10)
    assert learner.learning_rate(5) == pytest.approx(0.05)
    assert learner.learning_rate(5, longest=0.2) == pytest.approx(0.05)
    assert learner.learning_rate(5, longest=0.02) == pytest.approx(0.01)
    learner.rate_factor = 1 / 3
    assert learner.learning_rate(5, longest=0.02) == pytest.approx(0.01 / 3)


def test_gradients_of_zero_move_nothing_and_break_nothing() -> None:
    learner = new_learner()
    learner.open_window()
    learner.apply(0, Measurement(torch.zeros(3), WEIGHTS), learning_rate=0.1)
    assert not any(branch.c.any() for branch in learner.branches)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "sign"])
def test_a_restored_state_goes_on_bit_for_bit(optimizer: str) -> None:
    settings = {"optimizer": optimizer, "refresh_every": 3, "adapter_rank": 2, "lr_schedule": "cosine"}
    whole, stopped, resumed = (new_learner(**settings) for _ in range(3))
    run(whole, range(11))
    run(stopped, range(5))
    state = stopped.state()
    run(stopped, range(5, 8))  # what happens later must not reach into the state
    resumed.restore(state)
    run(resumed, range(5, 11))
    assert_same_bytes(resumed.state(), whole.state())
    resumed.restore(state)
    run(resumed, range(5, 11))
    assert_same_bytes(resumed.state(), whole.state())


def test_a_new_learners_state_can_be_restored() -> None:
    learner = new_learner(optimizer="adam")
    state = learner.state()
    run(learner, range(2))
    learner.restore(state)
    assert_same_bytes(learner.state(), state)


def test_momentum_is_carried_into_a_new_basis_and_adams_moments_start_again() -> None:
    momentum, adam = new_learner(optimizer="momentum"), new_learner(optimizer="adam")
    for learner in (momentum, adam):
        run(learner, range(2))
        learner.close_window(2)
    branch = momentum.branches[0]
    before = branch.moments[0] @ branch.group.basis.T
    branch.group.basis = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(0))).Q
    new = branch.group.basis
    for learner in (momentum, adam):
        learner.open_window()
    assert_close(branch.moments[0] @ new.T, before @ new @ new.T)
    assert not any(moment.any() for b in adam.branches for moment in b.moments)


@pytest.mark.parametrize("interrupt", [ValueError, KeyboardInterrupt])
def test_an_error_inside_puts_windows_bases_and_scales_back(interrupt: type[BaseException]) -> None:
    learner = new_learner(adapter_rank=1)
    run(learner, range(3))
    before = learner.state()

    def fail() -> None:
        with learner.undone_on_error():
            learner.close_window(2)
            for branch in learner.branches:
                branch.scale = 7.0
                branch.group.basis = torch.zeros_like(branch.group.basis)
            raise interrupt

    with pytest.raises(interrupt):
        fail()
    assert_same_bytes(learner.state(), before)


def test_an_adapter_is_what_was_learned_at_most_as_wide_as_allowed() -> None:
    wide, narrow = new_learner(refresh_every=1, adapter_rank=64), new_learner(refresh_every=1, adapter_rank=3)
    for learner in (wide, narrow):
        run(learner, range(4))
    for branch, pair in zip(wide.branches, wide.adapter().values(), strict=True):
        assert_close(pair.dense(), branch.learned().dense())
    assert {pair.rank for pair in narrow.adapter().values()} == {3}
    assert list(narrow.adapter()) == ["a", "b", "c"]


@pytest.mark.parametrize("scarce_in", ["agzo_edge.model.branch.draw_noise", "agzo_edge.train.learner.direction"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "sign"])
def test_a_step_that_runs_out_of_memory_has_changed_nothing_and_may_be_taken_again(
    optimizer: str, scarce_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, untroubled = new_learner(optimizer=optimizer), new_learner(optimizer=optimizer)
    for each in (learner, untroubled):
        run(each, range(2))
    calls: list[str] = []
    module, _, name = scarce_in.rpartition(".")
    plentiful = getattr(import_module(module), name)

    def scarce(*arguments: object, **key: object) -> object:
        calls.append(name)
        if len(calls) == 3:
            raise BudgetBrokenError("no memory for the last layer")
        return plentiful(*arguments, **key)

    with monkeypatch.context() as patched:
        patched.setattr(scarce_in, scarce)
        with pytest.raises(BudgetBrokenError):
            learner.apply(2, measured(2), learning_rate=0.1)
    assert_same_bytes(learner.state(), untroubled.state())
    for each in (learner, untroubled):
        each.apply(2, measured(2), learning_rate=0.1)
    assert_same_bytes(learner.state(), untroubled.state())
