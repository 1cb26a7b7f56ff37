"""Held-out numbers, against sums by hand."""

import math

import pytest
import torch
from helpers import teach_at_random, tiny_examples, tiny_model

from agzo_edge.train.data import collate
from agzo_edge.train.evaluate import Metrics, evaluate
from agzo_edge.train.objective import GOALS, loss_of


def test_an_lm_loss_is_the_mean_over_all_label_tokens() -> None:
    model, examples = tiny_model(), tiny_examples(7)
    teach_at_random(model)
    total = tokens = 0.0
    for example in examples:
        loss = loss_of(model, collate([example], pad_id=0, objective="lm"), goal=GOALS["lm"])
        total += float(loss[0, 0]) * example.label_tokens
        tokens += example.label_tokens
    metrics = evaluate(model, examples, objective="lm", goal=GOALS["lm"], batch_size=3)
    assert metrics.loss == pytest.approx(total / tokens, rel=1e-5)
    assert metrics.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert (metrics.examples, metrics.accuracy, metrics.macro_f1) == (7, None, None)
    assert metrics.intervals["loss"][0] < metrics.loss < metrics.intervals["loss"][1]


def test_a_choice_counts_every_example_the_same_and_tells_the_accuracy() -> None:
    model, examples = tiny_model(), tiny_examples(8, options=4)
    losses, right = [], 0
    for example in examples:
        losses.append(
            float(loss_of(model, collate([example], pad_id=0, objective="choice"), goal=GOALS["choice"])[0, 0])
        )
        options = [
            float(loss_of(model, collate([type(example)((row,), 0, "")], pad_id=0, objective="lm"), goal=GOALS["lm"]))
            for row in example.rows
        ]
        right += options.index(min(options)) == example.answer
    metrics = evaluate(model, examples, objective="choice", goal=GOALS["choice"], batch_size=3)
    assert metrics.loss == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert metrics.accuracy == right / 8
    assert metrics.intervals["accuracy"][0] < right / 8 < metrics.intervals["accuracy"][1]
    assert metrics.macro_f1 is not None


@pytest.mark.parametrize("options", [1, 3])
def test_the_batch_size_does_not_matter(options: int) -> None:
    model, examples = tiny_model(load_in_4bit=True), tiny_examples(9, options=options)
    objective = "lm" if options == 1 else "choice"
    results = [
        evaluate(model, examples, objective=objective, goal=GOALS[objective], batch_size=size)
        for size in (1, 4, 9, 100)
    ]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert result.accuracy == results[0].accuracy


def test_evaluating_changes_nothing() -> None:
    model, examples = tiny_model(), tiny_examples(4)
    teach_at_random(model)
    before = [(b.c.clone(), b.group.basis.clone(), b.scale) for b in model.branches]
    first = evaluate(model, examples, objective="lm", goal=GOALS["lm"], batch_size=2)
    assert evaluate(model, examples, objective="lm", goal=GOALS["lm"], batch_size=2) == first
    for branch, (c, basis, scale) in zip(model.branches, before, strict=True):
        assert torch.equal(branch.c, c)
        assert torch.equal(branch.group.basis, basis)
        assert branch.scale == scale


def test_a_hopeless_loss_has_a_perplexity_all_the_same() -> None:
    assert math.isfinite(Metrics(1, 1e6).perplexity)
