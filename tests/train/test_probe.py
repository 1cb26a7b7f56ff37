"""The plateau between rounding noise and curvature."""

import math

import pytest
import torch
from helpers import run_config, tiny_examples, tiny_model, unlimited
from torch import Tensor

from agzo_edge.train.data import DataReport, ExampleSet
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import Learner
from agzo_edge.train.loop import probed_mu, run_steps
from agzo_edge.train.probe import CANDIDATES, probe_mu

TRUE = torch.tensor([1.0, -2.0, 0.5])


def difference(*, rounding: float, curvature: float) -> object:
    """Projected gradients with an error of rounding / mu and one of curvature mu²."""

    def projected_at(mu: float) -> Tensor:
        generator = torch.Generator().manual_seed(round(1e6 * mu))
        return TRUE + rounding / mu * torch.randn(3, generator=generator) + curvature * mu**2 * TRUE.flip(0)

    return projected_at


@pytest.mark.parametrize(
    ("rounding", "curvature", "chosen"),
    [(1e-7, 100.0, {0.003}), (1e-3, 0.1, {0.1}), (1e-4, 10.0, {0.01, 0.03})],
)
def test_the_chosen_size_lies_between_rounding_and_curvature(
    rounding: float, curvature: float, chosen: set[float]
) -> None:
    probe = probe_mu(difference(rounding=rounding, curvature=curvature))
    assert probe.mu in chosen
    assert probe.noise_floor < 0.1
    assert probe.noise_floor == min(probe.disagreements[1:-1])
    assert len(probe.disagreements) == len(probe.candidates)


def test_pure_noise_is_seen_as_no_signal() -> None:
    probe = probe_mu(lambda mu: torch.randn(16, generator=torch.Generator().manual_seed(round(1e6 * mu))))
    assert probe.noise_floor > 0.3


@pytest.mark.parametrize(("rounding", "is_lost"), [(1e-4, False), (1e-2, False), (1.0, True), (1e3, True)])
def test_the_signal_is_lost_where_rounding_is_as_large_at_every_size(rounding: float, is_lost: bool) -> None:
    signal = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def projected_at(mu: float) -> Tensor:
        return signal + rounding / mu * torch.randn(64, generator=torch.Generator().manual_seed(round(1e6 * mu)))

    assert probe_mu(projected_at).is_lost is is_lost


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_size_at_which_the_loss_breaks_is_not_chosen(bad: float) -> None:
    exact = difference(rounding=1e-6, curvature=0.1)
    probe = probe_mu(lambda mu: exact(mu) if mu < 0.1 else torch.full((3,), bad))
    assert probe.mu in {0.01, 0.003}
    assert probe.disagreements[1] == 1.0
    assert all(map(math.isfinite, probe.disagreements))


def test_no_gradient_at_all_is_no_signal_and_no_error() -> None:
    probe = probe_mu(lambda mu: torch.zeros(3))
    assert probe.noise_floor == 1.0
    assert probe.mu in CANDIDATES


def example_set(n: int) -> ExampleSet:
    return ExampleSet(tiny_examples(n), DataReport("text", n, n, 0, 0, 0, 0), "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_has_a_plateau_and_probing_learns_nothing(dtype: str) -> None:
    config = run_config(dtype=dtype, batch_size=8)
    model = tiny_model(dtype=dtype)
    probe = probed_mu(model, example_set(12), config=config, goal=goal_of(config))
    assert probe.mu in CANDIDATES[1:-1]
    assert probe.noise_floor < (0.05 if dtype == "float32" else 0.5)
    assert not any(branch.learned().dense().any() for branch in model.branches)


def test_float16_sizes_that_overflow_leave_the_choice_to_smaller_ones() -> None:
    config = run_config(dtype="float16", batch_size=8)
    model = tiny_model(dtype="float16")
    for name, layer in model.layers.items():
        if name.endswith("down_proj"):
            layer.base.dense().mul_(8_000)  # just within float16, and beyond it once a third is added
    probe = probed_mu(model, example_set(12), config=config, goal=goal_of(config))
    assert probe.disagreements[0] == 1.0
    assert probe.mu < 0.1
    assert not probe.is_lost


def test_a_run_stopped_and_restored_ends_bitwise_where_the_whole_one_ends() -> None:
    data = example_set(12)
    config = run_config(batch_size=4, micro_batch_size=2, max_steps=7, refresh_every=3)
    whole_model, model = tiny_model(), tiny_model()
    whole = Learner(whole_model.branches, config)
    records = [
        timed.record
        for timed in run_steps(
            whole_model, whole, data, guard=unlimited(whole_model, config), mu=0.01, goal=goal_of(config)
        )
    ]
    assert [record.step for record in records] == list(range(7))

    stopped = Learner(model.branches, config)
    for timed in run_steps(model, stopped, data, guard=unlimited(model, config), mu=0.01, goal=goal_of(config)):
        assert timed.tokens > 0
        assert timed.peak_bytes > 0
        if timed.record.step == 3:
            break
    again = tiny_model()
    resumed = Learner(again.branches, config)
    resumed.restore(stopped.state())
    steps = run_steps(again, resumed, data, guard=unlimited(again, config), mu=0.01, first_step=4, goal=goal_of(config))
    rest = [timed.record for timed in steps]
    assert rest == records[4:]
    ours, theirs = resumed.state(), whole.state()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
