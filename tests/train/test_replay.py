"""A learner rebuilt from records and bases alone is bitwise the one that ran."""

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from helpers import run_config, tiny_checkpoint, tiny_micro_batches

from agzo_edge.model.branch import make_branches
from agzo_edge.model.load import load_model
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import Learner
from agzo_edge.train.replay import replay
from agzo_edge.train.step import agzo_step

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"optimizer": "momentum"},
    "adam": {"optimizer": "adam"},
    "sign": {"optimizer": "sign"},
    "gaussian shared": {"noise": "gaussian", "directions": "shared", "normalize": False},
    "narrow": {"refresh_every": 1, "adapter_rank": 2, "rank": 2},
    "cosine": {"lr_schedule": "cosine", "warmup_steps": 2, "max_steps": 9},
    "one basis": {"refresh_every": 0},
    "guided": {"guide": "head"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_records_and_bases_give_the_same_bytes(case: str, micro_batch_size: int) -> None:
    config = run_config(**{"refresh_every": 3, "load_in_4bit": True, **CASES[case]})
    model = load_model(tiny_checkpoint("llama"), config)
    learner = Learner(model.branches, config)
    lines, bases = [], {}
    for step in range(8):
        batches = tiny_micro_batches(4, micro_batch_size, seed=step)
        record = agzo_step(model, batches, learner, step=step, mu=0.01, config=config, goal=goal_of(config))
        lines.append(json.dumps(asdict(record)))
        if learner.window_starts(step):
            bases[step] = copy.deepcopy(learner.window())
    fresh = Learner(
        make_branches(
            [(b.name, b.out_features, b.group.index) for b in model.branches],
            [group.in_features for group in model.groups],
            rank=config.rank,
            guided=config.guide == "head",
        ),
        config,
    )
    replay(fresh, map(json.loads, lines), bases.__getitem__)
    ours, theirs = learner.state(), fresh.state()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_no_records_leave_a_learner_as_it_was() -> None:
    learner = Learner(make_branches([("a", 4, 0)], [3], rank=2), run_config())
    replay(learner, [], {}.__getitem__)
    assert not learner.adapter()["a"].dense().any()
