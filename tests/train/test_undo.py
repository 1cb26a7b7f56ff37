"""Seeing harm and going back: the criteria, and the learner's exact return."""

import math
from typing import Any

import pytest
import torch
from helpers import assert_same_bytes, run_config, tiny_micro_batches, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.train.data import DataReport, Example, ExampleSet
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import RATE_AFTER_UNDO, Learner
from agzo_edge.train.step import agzo_step
from agzo_edge.train.undo import (
    has_paid,
    held_back,
    is_due,
    is_gain,
    is_harm,
    is_lost,
    n_watched,
    watched_examples,
)

EMPTY_REPORT = DataReport(
    format="text", rows_read=0, rows_used=0, rows_truncated=0, rows_dropped=0, label_tokens=0, longest_tokens=0
)
losses = st.lists(st.floats(0.0, 50.0), min_size=2, max_size=32)


@given(losses=losses, rise=st.floats(0.1, 5.0))
def test_a_rise_of_all_is_harm_and_a_fall_of_all_is_none(losses: list[float], rise: float) -> None:
    higher = [loss + rise for loss in losses]
    assert is_harm(higher, losses)
    assert not is_harm(losses, higher)
    assert is_gain(losses, higher, of_start=True)
    assert not is_gain(losses, losses, of_start=False)


def test_a_rise_within_chance_is_no_harm_but_at_the_last_look() -> None:
    best = [1.0, 2.0, 3.0, 4.0]
    wavering = [2.0, 1.2, 4.0, 3.2]  # differences 1, -0.8, 1, -0.8: a mean of 0.1 with an error of 0.52
    assert not is_harm(wavering, best)
    assert not is_gain(wavering, best, of_start=False)
    assert is_harm([1.0, math.nan, 3.0, 4.0], best)
    assert not is_harm([9.0, 9.0], []), "there is nothing to compare with yet"


def test_what_chance_may_give_is_a_gain_over_a_later_state_and_none_over_the_start() -> None:
    start, lower = [1.0, 2.0, 3.0, 4.0] * 4, [0.5, 2.4, 2.9, 4.1] * 4
    assert is_gain(lower, start, of_start=False)
    assert not is_gain(lower, start, of_start=True)
    assert is_gain([0.5, 1.9, 2.5, 3.9] * 4, start, of_start=True)
    assert not is_gain([0.5, math.nan, 2.5, 3.9], start[:4], of_start=False)


def test_a_short_run_that_watches_few_is_kept_unless_it_did_harm() -> None:
    start, wavering = [1.0, 2.0, 3.0, 4.0], [1.3, 1.8, 3.2, 3.9]
    assert has_paid(wavering, start, of_start=True)
    assert not has_paid([1.3, 2.2, 3.2, 4.3], start, of_start=True)
    assert not has_paid(wavering * 4, start * 4, of_start=True)
    assert not has_paid([1.3, math.inf, 3.2, 3.9], start, of_start=True)


def test_a_single_example_that_got_worse_is_harm() -> None:
    assert is_harm([1.5], [1.0])
    assert not is_harm([1.0], [1.0])


def test_a_batch_far_above_the_best_state_asks_for_a_look() -> None:
    best = [1.0, 2.0, 3.0]  # mean 2, deviation 0.82
    assert is_lost(3.7, best, batch_size=16)
    assert not is_lost(3.6, best, batch_size=16)
    assert not is_lost(1e9, [], batch_size=16), "nothing was looked at yet"


def test_a_single_example_far_above_the_mean_is_nothing_strange() -> None:
    best = [1.0, 2.0, 3.0]
    assert is_lost(8.6, best, batch_size=1)
    assert not is_lost(8.4, best, batch_size=1)


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({}, [0, 50, 100]),
        ({"batch_size": 4}, [0]),
        ({"batch_size": 8}, [0, 100]),
        ({"batch_size": 64}, [0, 50, 100]),
        ({"undo_every": 0}, []),
        ({"target": "dequantized"}, []),
        ({"objective": "reward", "reward": "length"}, []),
    ],
)
def test_looks_take_the_same_share_of_a_run_whatever_the_batch(settings: dict[str, Any], due: list[int]) -> None:
    config = run_config(max_steps=120, **settings)
    assert [step for step in range(120) if is_due(step, config)] == due


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "momentum"}, {"refresh_every": 0}, {"guide": "head", "refresh_every": 2}]
)
def test_going_back_is_exact_and_survives_a_checkpoint(settings: dict[str, Any]) -> None:
    config = run_config(**{"refresh_every": 3, "adapter_rank": 4} | settings)
    model = tiny_model(**{"refresh_every": 3, "adapter_rank": 4} | settings)
    learner = Learner(model.branches, config)

    def take(steps: range) -> None:
        for step in steps:
            agzo_step(
                model,
                tiny_micro_batches(4, 4, seed=step),
                learner,
                step=step,
                mu=0.01,
                config=config,
                goal=goal_of(config),
            )

    def present() -> dict[str, torch.Tensor]:
        state = {name: tensor for name, tensor in learner.state().items() if not name.startswith("best")}
        del state["rate_factor"]
        return {name: tensor.clone() for name, tensor in state.items()}

    take(range(4))
    learner.watch([1.0, 2.0], step=4)
    then = present()
    take(range(4, 9))
    learner.watch([1.5, 2.0], step=9)  # worse: the earlier state stays the best
    checkpoint = {name: tensor.clone() for name, tensor in learner.state().items()}
    assert learner.go_back() == 4
    assert_same_bytes(present(), then)
    assert learner.rate_factor == RATE_AFTER_UNDO
    take(range(9, 12))
    learner.restore(checkpoint)
    assert learner.go_back() == 4
    assert_same_bytes(present(), then)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "momentum"}, {"optimizer": "adam"}, {"refresh_every": 0}, {"guide": "head", "refresh_every": 5}],
)
def test_a_run_that_goes_back_to_its_start_learns_on_in_the_window_that_is_open(settings: dict[str, Any]) -> None:
    config = run_config(**{"refresh_every": 5} | settings)
    model = tiny_model(**{"refresh_every": 5} | settings)
    learner = Learner(model.branches, config)
    learner.watch([1.0, 2.0], step=0)  # before there are bases, scales and guides
    for step in (0, 1):
        agzo_step(
            model, tiny_micro_batches(4, 4, seed=step), learner, step=step, mu=0.01, config=config, goal=goal_of(config)
        )
    window = learner.window()
    assert learner.go_back() == 0
    assert all(branch.is_untouched for branch in model.branches)
    assert_same_bytes(learner.window().tensors(), window.tensors())
    record = agzo_step(
        model, tiny_micro_batches(4, 4, seed=2), learner, step=2, mu=0.01, config=config, goal=goal_of(config)
    )
    assert any(record.projected)
    assert not any(branch.is_untouched for branch in model.branches)


def test_there_must_be_a_state_to_go_back_to() -> None:
    learner = Learner(tiny_model().branches, run_config())
    with pytest.raises(ValueError, match="no state"):
        learner.go_back()


def test_going_back_makes_the_rate_smaller_for_good() -> None:
    config = run_config(learning_rate=0.9, lr_schedule="constant")
    learner = Learner(tiny_model().branches, config)
    learner.watch([1.0], step=0)
    learner.go_back()
    learner.go_back()
    assert learner.learning_rate(7) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("n_examples", "max_steps", "batch_size", "watched"),
    [(1000, 500, 16, 64), (1000, 50, 16, 32), (1000, 20, 1, 4), (3, 500, 16, 3), (40, 500, 16, 40)],
)
def test_a_run_watches_a_share_of_its_examples_spread_over_the_data(
    n_examples: int, max_steps: int, batch_size: int, watched: int
) -> None:
    examples = [Example(rows=(), answer=0, place=f"rows.jsonl:{i + 1}") for i in range(n_examples)]
    data = ExampleSet(examples, EMPTY_REPORT, sha256="")
    found = n_watched(data, run_config(max_steps=max_steps, batch_size=batch_size))
    assert found == watched
    places = [int(example.place.rpartition(":")[2]) for example in watched_examples(data, found)]
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (1, n_examples)


@given(answers=st.lists(st.integers(0, 2), min_size=64, max_size=1000))
def test_the_watched_have_each_answer_as_often_as_the_data(answers: list[int]) -> None:
    """Within two examples, so that leaning to an answer is not taken for learning."""
    examples = [Example(rows=(), answer=answer, place="") for answer in answers]
    watched = watched_examples(ExampleSet(examples, EMPTY_REPORT, sha256=""), 64)
    for answer in range(3):
        share = answers.count(answer) / len(answers)
        assert abs(sum(example.answer == answer for example in watched) - 64 * share) <= 2


@given(answers=st.lists(st.integers(0, 2), min_size=1, max_size=1000))
def test_what_is_held_back_is_a_tenth_at_most_and_none_of_a_few(answers: list[int]) -> None:
    examples = [Example(rows=(), answer=answer, place="") for answer in answers]
    held = held_back(examples, run_config())
    assert len(set(held)) == len(held) == (min(64, len(answers) // 10) if len(answers) >= 160 else 0)
    for answer in range(3):
        share = answers.count(answer) / len(answers)
        assert abs(sum(answers[place] == answer for place in held) - share * len(held)) <= 2


@pytest.mark.parametrize(
    "settings", [{"undo_every": 0}, {"target": "dequantized"}, {"objective": "reward", "reward": "length"}]
)
def test_a_run_that_never_looks_holds_nothing_back(settings: dict[str, Any]) -> None:
    assert held_back([Example(rows=(), answer=0, place="")] * 999, run_config(**settings)) == []


def test_of_what_is_held_back_a_short_run_watches_some_and_a_resumed_one_as_many_as_before() -> None:
    trained, held = ([Example(rows=(), answer=0, place=f"{name}:{i}") for i in range(40)] for name in "ab")
    data = ExampleSet(trained, EMPTY_REPORT, sha256="", held_back=held)
    assert n_watched(data, run_config(max_steps=50, batch_size=16)) == 32
    assert n_watched(data, run_config(max_steps=500, batch_size=16)) == 40
    assert {example.place[0] for example in watched_examples(data, 32)} == {"b"}
