"""Evaluations during a run: the best adapter is kept, and a run without progress ends."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import agzo_edge
from agzo_edge import demo
from agzo_edge.config import RunConfig, config_from
from agzo_edge.errors import ConfigError
from agzo_edge.events import Evaluated, Event, Finished, Planned, Stepped
from agzo_edge.rundir import keep_evaluations, kept_evaluations
from agzo_edge.session import training
from agzo_edge.train.best import best_step, out_of_patience
from agzo_edge.train.data import Batch, Example, collate
from agzo_edge.train.evaluate import Metrics


def losses(*values: float) -> dict[int, Metrics]:
    return {10 * i: Metrics(8, value) for i, value in enumerate(values)}


def test_the_best_evaluation_is_the_first_of_the_least_losses_of_a_trained_model() -> None:
    assert best_step(losses(1.0, 3.0, 2.0, 2.0, 4.0), "loss") == 20
    assert best_step(losses(1.0), "loss") is None
    accurate = {step: Metrics(8, 1.0, accuracy=share) for step, share in ((0, 0.9), (5, 0.5), (10, 0.7))}
    assert best_step(accurate, "accuracy") == 10


def test_patience_ends_when_so_many_evaluations_were_no_better_than_one_before() -> None:
    falling, flat = losses(4.0, 3.0, 2.0), losses(4.0, 3.0, 3.0, 3.5)
    assert not any(out_of_patience(falling, "loss", patience=patience) for patience in (0, 1, 2, 9))
    assert out_of_patience(flat, "loss", patience=2)
    assert not out_of_patience(flat, "loss", patience=3)
    assert not out_of_patience(flat, "loss", patience=0)


def test_what_is_not_finite_is_the_worst_and_is_kept_as_null(tmp_path: Path) -> None:
    lost = losses(4.0, math.nan, 3.0, math.inf)
    assert best_step(lost, "loss") == 20
    assert out_of_patience(losses(2.0, 3.0, math.nan), "loss", patience=2)
    keep_evaluations(tmp_path, lost, data_sha256="a")
    assert "NaN" not in (tmp_path / "evaluations.json").read_text()
    found = kept_evaluations(tmp_path, data_sha256="a")
    assert [math.isfinite(metrics.loss) for metrics in found.values()] == [True, False, True, False]
    assert kept_evaluations(tmp_path, data_sha256="b") is None
    assert kept_evaluations(tmp_path / "elsewhere", data_sha256="b") == {}


def config_of(out: Path, **settings: object) -> RunConfig:
    small = {"max_steps": 12, "refresh_every": 4, "batch_size": 4, "eval_steps": 2, "save_steps": 0, "mu": 0.01}
    return config_from(demo.demo_settings(), small, {"output_dir": str(out), "lr_schedule": "constant"}, settings)


def steps_of(events: list[Event]) -> int:
    return sum(isinstance(event, Stepped) for event in events)


def test_the_best_adapter_is_the_one_of_its_step(tmp_path: Path) -> None:
    list(training(config_of(tmp_path / "run", learning_rate=20.0, normalize=False, undo_every=0)))  # far too large
    best = json.loads((tmp_path / "run" / "report.json").read_text())["best_step"]
    assert best < 12
    list(training(config_of(tmp_path / "short", learning_rate=20.0, normalize=False, max_steps=best, undo_every=0)))
    kept, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run/best", "short"))
    assert kept.keys() == expected.keys()
    assert all(kept[name].equal(expected[name]) for name in kept)


def test_what_a_run_reports_is_what_its_adapter_scores(tmp_path: Path) -> None:
    """Of what was learned: the sum of windows is wider than the adapter, and is cut when it is saved."""
    config = config_of(tmp_path / "run", adapter_rank=2, undo_every=0)
    *_, finished = training(config)
    assert isinstance(finished, Finished)
    scored = agzo_edge.evaluate(data=str(config.eval_data), adapter=tmp_path / "run")
    assert finished.run.after is not None
    assert finished.run.after.loss == pytest.approx(scored.loss, rel=1e-4)


def test_a_run_without_progress_stops_and_stays_stopped_when_it_is_resumed(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", learning_rate=6.0, normalize=False, early_stopping_patience=2)
    events = list(training(config))
    done = steps_of(events)
    assert done < 12
    assert max(event.step for event in events if isinstance(event, Evaluated)) == done
    again = list(training(config, resume=True))
    assert steps_of(again) == 0
    assert isinstance(again[-1], Finished)
    more = list(training(config.model_copy(update={"early_stopping_patience": 0}), resume=True))
    assert steps_of(more) == 12 - done


def test_other_held_out_rows_set_aside_what_was_found_and_say_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    list(training(config_of(out, max_steps=4)))
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Is it?", "completion": " It be."}\n' * 3)
    events = list(training(config_of(out, max_steps=6, eval_data=str(other)), resume=True))
    (planned,) = (event for event in events if isinstance(event, Planned))
    assert any("held-out rows are others" in note for note in planned.notes)
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.run.before is None, "nobody scored the model on these before it was trained"
    assert finished.run.after is not None


def test_a_stopped_run_ends_early_where_the_whole_one_does(tmp_path: Path) -> None:
    whole = config_of(tmp_path / "whole", learning_rate=6.0, normalize=False, early_stopping_patience=2)
    list(training(whole))
    config = whole.model_copy(update={"output_dir": str(tmp_path / "cut")})
    events = training(config)
    next(event for event in events if isinstance(event, Stepped) and event.timed.record.step == 2)
    events.close()
    list(training(config, resume=True))
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"metric_for_best_model": "accuracy"}, "accuracy is not told by lm"),
        ({"early_stopping_patience": 2, "eval_data": None}, "needs eval_data"),
        ({"early_stopping_patience": 2, "eval_steps": 0, "eval_data": "x"}, "eval_steps"),
    ],
)
def test_what_no_evaluation_tells_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_from({"model": "m", "data": "d"}, settings)


def test_an_evaluation_works_in_the_pieces_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def noted(examples: Sequence[Example], **named: Any) -> Batch:
        sizes.append(len(examples))
        return collate(examples, **named)

    monkeypatch.setattr("agzo_edge.train.evaluate.collate", noted)
    data = str(demo.DATA_DIR / demo.VALID_NAME)
    whole = agzo_edge.evaluate(str(demo.MODEL_DIR), data, batch_size=8)
    assert max(sizes) > 3
    sizes.clear()
    pieces = agzo_edge.evaluate(str(demo.MODEL_DIR), data, batch_size=8, micro_batch_size=3, fuse_signs=False)
    assert max(sizes) == 3
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)
