"""Learning from rewards: estimates, whole runs, and what is refused before anything is written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_config, tiny_batch, tiny_micro_batches, tiny_model

import agzo_edge
from agzo_edge.budget.facts import model_facts
from agzo_edge.budget.memory import job_of
from agzo_edge.budget.profile import load_profile
from agzo_edge.budget.working import moments
from agzo_edge.cli.run import exit_code_of
from agzo_edge.config import RunConfig, config_from
from agzo_edge.demo import DATA_DIR, MODEL_DIR, TRAIN_NAME
from agzo_edge.errors import ConfigError
from agzo_edge.events import Event, Stepped
from agzo_edge.session import training
from agzo_edge.train.objective import loss_of
from agzo_edge.train.reward import RewardGoal, reward_goal
from agzo_edge.train.step import measure

OURS = "import time\n" + "\n".join(
    f"def {name}(prompt, text, row): {body}"
    for name, body in {
        "vowels": "return sum(c in 'aeiou' for c in text)",
        "raises": "return {}['answer']",
        "hangs": "time.sleep(60)",
    }.items()
)
SETTINGS: dict[str, Any] = {"objective": "reward", "max_new_tokens": 6, "temperature": 1.0}


@pytest.fixture
def ours(tmp_path: Path) -> str:
    (tmp_path / "ours.py").write_text(OURS)
    return str(tmp_path / "ours.py")


@pytest.fixture
def goal(ours: str) -> Iterator[RewardGoal]:
    goal = reward_goal(run_config(**SETTINGS, reward=f"{ours}:vowels"))
    yield goal
    goal.close()


def with_prompts(batch: Any) -> Any:
    from dataclasses import replace

    return replace(batch, fields=tuple({"prompt": "?"} for _ in batch.places))


def test_the_loss_of_each_sign_is_minus_its_own_reward(goal: RewardGoal) -> None:
    model, batch = tiny_model(), with_prompts(tiny_batch(4))
    measured, _ = measure(model, [batch], step=3, mu=0.3, config=run_config(**SETTINGS, reward="f1"), goal=goal)
    assert measured.projected.shape == (4,)
    assert measured.projected.abs().max() > 0  # the signs write different texts
    differences = measured.projected * 0.6  # 2 mu: of whole numbers of vowels
    torch.testing.assert_close(differences, differences.round(), rtol=0, atol=1e-4)


def test_micro_batches_measure_what_one_batch_does(goal: RewardGoal) -> None:
    model, config = tiny_model(), run_config(**SETTINGS, reward="f1")
    whole, _ = measure(model, [with_prompts(tiny_batch(4))], step=3, mu=0.3, config=config, goal=goal)
    parts = [with_prompts(batch) for batch in tiny_micro_batches(4, 2)]
    split, _ = measure(model, parts, step=3, mu=0.3, config=config, goal=goal)
    torch.testing.assert_close(split.projected, whole.projected)
    other, _ = measure(model, parts, step=4, mu=0.3, config=config, goal=goal)
    assert not torch.equal(other.projected, whole.projected)


def test_an_evaluation_takes_the_likeliest_answers(goal: RewardGoal) -> None:
    model, batch = tiny_model(), with_prompts(tiny_batch(4))
    with model.context.running(mask=batch.attention_mask.bool()):
        losses = goal.outcome(model, batch).losses
        assert torch.equal(losses, goal.at(9).outcome(model, batch).losses)
    greedy = RewardGoal(goal.judge, goal.max_new_tokens, temperature=0.0, seed=0)
    assert torch.equal(losses, loss_of(model, batch, goal=greedy)[0])


def prompts_file(folder: Path, n: int = 12) -> Path:
    lines = (DATA_DIR / TRAIN_NAME).read_text(encoding="utf-8").splitlines()[:n]
    path = folder / "prompts.jsonl"
    rows = [{"prompt": json.loads(line)["messages"][:1], "answer": "Arr, matey!"} for line in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(folder: Path, out: str, **settings: Any) -> RunConfig:
    base = {"model": str(MODEL_DIR), "data": str(prompts_file(folder)), "output_dir": str(folder / out)}
    small = {"max_steps": 4, "batch_size": 4, "refresh_every": 2, "max_seq_length": 48, "device": "cpu"}
    reward = {"objective": "reward", "reward": "length", "reward_argument": "30", "max_new_tokens": 8}
    return config_from(base, small, reward, settings)


def steps_of(events: list[Event]) -> list[Stepped]:
    return [event for event in events if isinstance(event, Stepped)]


def test_a_stopped_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    whole = steps_of(list(training(config_of(tmp_path, "whole"))))
    assert any(any(event.timed.record.projected) for event in whole)
    events = training(config_of(tmp_path, "cut"))
    next(event for event in events if isinstance(event, Stepped) and event.timed.record.step == 1)
    events.close()
    list(training(config_of(tmp_path, "cut"), resume=True))
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


def test_an_evaluation_tells_the_mean_reward_with_its_interval(tmp_path: Path) -> None:
    prompts = prompts_file(tmp_path)
    settings = {"objective": "reward", "reward": "f1", "max_new_tokens": 8, "device": "cpu"}
    metrics = agzo_edge.evaluate(str(MODEL_DIR), str(prompts), **settings)
    assert metrics.reward == -metrics.loss
    assert metrics.intervals["reward"][0] <= metrics.reward <= metrics.intervals["reward"][1]
    assert not metrics.is_likelihood


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("--reward", "{ours}:raises"), "prompts.jsonl:"),
        (("--reward", "{ours}:raises"), "raised KeyError: 'answer'"),
        (("--reward", "{ours}:hangs", "--reward-timeout-s", "0.2"), "took longer than 0.2 s"),
        (("--reward", "{ours}:missing"), "holds no function 'missing'"),
        (("--reward", "regex"), "--reward-argument"),
        ((), "--objective reward --reward exact_match"),
        (("--reward", "f1", "--difference", "exact"), "use central"),
        (("--reward", "f1", "--answer-field", "solution"), "'solution' is missing or null"),
        (("--reward", "f1", "--max-seq-length", "4"), "more than 4 tokens"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, ours: str, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], told: str
) -> None:
    arguments = ["train", "--model", str(MODEL_DIR), "--data", str(prompts_file(tmp_path)), "--device", "cpu"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--objective", "reward", "--max-new-tokens", "4"]
    assert exit_code_of([*arguments, *(part.format(ours=ours) for part in extra)]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reward_without_its_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="go together"):
        config_from({"reward": "f1"})


def test_the_plan_counts_the_keys_and_values_of_both_signs() -> None:
    facts = model_facts(str(MODEL_DIR))
    settings = {"device": "cpu", "batch_size": 8, "max_seq_length": 100}
    reward = {"objective": "reward", "reward": "f1", "max_new_tokens": 28}
    profile = load_profile("rtx-3060-12gb")
    caches = [
        {moment.cache for moment in moments(job_of(facts, run_config(**settings, **more), profile))}
        for more in ({}, reward)
    ]
    entries = 2 * 8 * 128 * facts.kv_width * 2  # rows, tokens, width, keys and values
    assert caches == [{0}, {0, entries * (facts.n_layers + 1) * 4}]
