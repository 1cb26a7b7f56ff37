"""Pairs of answers: the losses against their formulas on transformers' own model, and what learns from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from character_tokens import CHATML_MARKED, character_tokenizer
from helpers import dense_reference, reference_logits, run_config, teach_at_random, tiny_examples, tiny_model
from torch import Tensor
from torch.testing import assert_close

import agzo_edge
from agzo_edge.config import RunConfig
from agzo_edge.errors import ConfigError, DataError
from agzo_edge.model.passes import Perturbation
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.noise import draw_noise
from agzo_edge.train.data import Batch, Example, collate
from agzo_edge.train.evaluate import evaluate
from agzo_edge.train.examples import load_examples
from agzo_edge.train.objective import GOALS, loss_of
from agzo_edge.train.preference import PreferenceGoal

Jsonl = Callable[..., str]
DPO, SIMPO = PreferenceGoal("dpo", 0.3), PreferenceGoal("simpo", 2.0)


def pairs(n: int = 4) -> list[Example]:
    """Pairs of rows with the same prompt; the better one comes first."""
    return [Example(example.rows[:2], 0, example.place) for example in tiny_examples(n, options=3)]


def pair_batch(n: int = 4) -> Batch:
    return collate(pairs(n), pad_id=0, objective="preference")


def row_log_likelihoods(plain: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum over each row's labels by transformers' own model, and how many they are."""
    log_p = F.log_softmax(reference_logits(plain, batch)[:, :-1].float(), dim=-1)
    picked = log_p.gather(-1, batch.input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    is_label = batch.is_label[:, 1:]
    return (picked * is_label).sum(1), is_label.sum(1)


def learned_reference(model: EdgeModel) -> Any:
    return dense_reference(model, change=lambda branch: branch.learned().dense())


def test_the_dpo_loss_is_its_formula_with_the_untrained_base_as_reference() -> None:
    model, batch = tiny_model(), pair_batch()
    teach_at_random(model)
    policy, _ = row_log_likelihoods(learned_reference(model), batch)
    base, _ = row_log_likelihoods(dense_reference(model), batch)
    ratio = policy - base
    expected = -F.logsigmoid(0.3 * (ratio[0::2] - ratio[1::2]))
    assert_close(loss_of(model, batch, goal=DPO)[0], expected, rtol=1e-3, atol=1e-4)


def test_the_simpo_loss_is_its_formula() -> None:
    model, batch = tiny_model(), pair_batch()
    teach_at_random(model)
    sums, counts = row_log_likelihoods(learned_reference(model), batch)
    mean = sums / counts
    expected = -F.logsigmoid(2.0 * (mean[0::2] - mean[1::2]) - 0.5)
    assert_close(loss_of(model, batch, goal=SIMPO)[0], expected, rtol=1e-3, atol=1e-4)


def test_before_anything_is_learned_dpo_prefers_nothing() -> None:
    model = tiny_model(load_in_4bit=True)
    losses = loss_of(model, pair_batch(), goal=DPO)
    assert_close(losses, torch.full_like(losses, 2).log(), rtol=0, atol=1e-6)
    metrics = evaluate(model, pairs(), objective="preference", batch_size=2, goal=DPO)
    assert metrics.accuracy == 0.0  # a margin of exactly zero prefers none


@pytest.mark.parametrize("goal", [DPO, SIMPO], ids=["dpo", "simpo"])
def test_the_exact_derivative_is_the_limit_of_the_difference(goal: PreferenceGoal) -> None:
    model, batch = tiny_model(), pair_batch()
    teach_at_random(model)

    def perturbed(*steps: float, exact: bool = False) -> Tensor:
        def noise_of(branch: Any) -> Tensor:
            return draw_noise("sign", (4, *branch.c.shape), seed=0, step=0, layer=branch.index, first_example=0)

        perturbation = Perturbation(noise_of=noise_of, example=batch.example, steps=steps, exact=exact)
        return loss_of(model, batch, goal=goal, perturbation=perturbation)

    plus, minus = perturbed(1e-3, -1e-3)
    assert_close((plus - minus) / 2e-3, perturbed(1.0, exact=True)[1], rtol=0.02, atol=0.02)


def test_the_reference_pass_leaves_the_learned_parts_where_they_were() -> None:
    model, batch = tiny_model(), pair_batch()
    teach_at_random(model)
    before = loss_of(model, batch, goal=GOALS["lm"])
    loss_of(model, batch, goal=DPO)
    assert torch.equal(loss_of(model, batch, goal=GOALS["lm"]), before)
    assert not model.context.base_only


def load(source: str, template: str | None = None, **settings: Any) -> list[Example]:
    tokenizer = character_tokenizer("<s> $A")
    tokenizer.chat_template = template
    config = RunConfig(objective="preference", max_seq_length=99, **settings)
    return list(load_examples(source, tokenizer, config).examples)


def test_answers_are_scored_from_one_boundary_with_their_end(jsonl: Jsonl) -> None:
    (example,) = load(jsonl({"prompt": "ab", "chosen": "cde", "rejected": "f"}))
    assert [int(row.is_label.argmax()) for row in example.rows] == [3, 3]
    assert [int(row.is_label.sum()) for row in example.rows] == [4, 2]
    assert example.answer == 0


@pytest.mark.parametrize("beside", [{}, {"prompt": None}, {"prompt": "Hi"}])
def test_two_whole_conversations_part_where_they_differ(jsonl: Jsonl, beside: dict[str, Any]) -> None:
    def talk(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]

    whole = load(jsonl({**beside, "chosen": talk("yes"), "rejected": talk("no")}), CHATML_MARKED)
    apart = {"prompt": talk("")[:1], "chosen": talk("yes")[1:], "rejected": talk("no")[1:]}
    (expected,) = load(jsonl(apart), CHATML_MARKED)
    for row, other in zip(whole[0].rows, expected.rows, strict=True):
        assert row.input_ids.tolist() == other.input_ids.tolist()
        assert row.is_label.tolist() == other.is_label.tolist()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "é", "rejected": "ü"}, "chosen and rejected are the same tokens"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
        ({"chosen": "a", "rejected": "b"}, "prompt is missing or null"),
        ({"prompt": "a", "chosen": "b"}, "needs chosen and rejected"),
        ({"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}, "empty"),
    ],
)
def test_a_pair_that_cannot_be_told_apart_is_a_fault(jsonl: Jsonl, row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=rf"notes.jsonl:1: .*{told}"):
        load(jsonl(row))


def test_dpo_cannot_refer_to_a_base_that_is_written_into() -> None:
    with pytest.raises(ConfigError, match="use preference_loss simpo"):
        run_config(objective="preference", target="dequantized")
    run_config(objective="preference", target="dequantized", preference_loss="simpo")


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_a_run_comes_to_prefer_what_it_was_shown(tmp_path: Path, loss: str) -> None:
    """A small set of our own: the answer in the voice of the embedded demo is the better one."""
    from agzo_edge.demo import DATA_DIR, MODEL_DIR, TRAIN_NAME

    lines = (DATA_DIR / TRAIN_NAME).read_text(encoding="utf-8").splitlines()[:64]
    talks = [json.loads(line)["messages"] for line in lines]
    plain = "I do not know. It is a nice day."
    rows = [{"chosen": talk, "rejected": [*talk[:-1], {"role": "assistant", "content": plain}]} for talk in talks]
    for name, part in (("train.jsonl", rows[:48]), ("valid.jsonl", rows[48:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    run = agzo_edge.finetune(
        str(MODEL_DIR), str(tmp_path), eval_data=str(tmp_path), output_dir=str(tmp_path / "run"), device="cpu",
        objective="preference", preference_loss=loss, max_steps=30, batch_size=8, max_seq_length=96, mu=0.01,
    )  # fmt: skip
    assert run.after is not None
    assert run.before is not None
    assert run.after.loss < 0.9 * run.before.loss
    if loss == "dpo":  # simpo asks for likelier answers, whatever the base thinks of them
        assert run.after.accuracy == 1.0
