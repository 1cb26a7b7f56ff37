import io
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import agzo_edge
from agzo_edge.budget.job import Component
from agzo_edge.budget.memory import InPieces, MemoryPlan, Saving
from agzo_edge.budget.qlora import QloraNeed
from agzo_edge.cli.as_json import event_object, json_line
from agzo_edge.cli.course import Course
from agzo_edge.cli.ending_view import before_after, ending_lines, generate_command
from agzo_edge.cli.run_view import data_line, event_lines, live_view
from agzo_edge.cli.screen import comparison, curve, duration, facts_lines, plan_table, report_lines, verdict
from agzo_edge.cli.watch import PLAIN_STEP_LINES, watch, watch_json
from agzo_edge.config import RunConfig
from agzo_edge.demo import demo_settings
from agzo_edge.events import (
    DataReady,
    Evaluated,
    Event,
    Finished,
    ModelReady,
    MuChosen,
    Planned,
    Run,
    Saved,
    Stepped,
)
from agzo_edge.train.data import DataReport
from agzo_edge.train.evaluate import Metrics
from agzo_edge.train.loop import TimedStep
from agzo_edge.train.probe import MuProbe
from agzo_edge.train.step import StepRecord
from agzo_edge.units import GIB, MIB

N_STEPS = 100
SAMPLES = [{"prompt": "Who [are] you?", "before": "I don't know", "after": "Arr, matey!"}]


def plan_of(limit_bytes: int) -> MemoryPlan:
    components = (
        Component("weights", 3 * GIB, "device", "6,000,000,000 weights x 1/2 B"),
        Component("activations", GIB, "device", "8 rows x 512 tokens"),
        Component("journal", MIB, "disk", "100 x 684 B"),
    )
    return MemoryPlan(
        profile_name="gtx-1650-4gb",
        dtype="float16",
        rows=8,
        row_tokens=512,
        components=components,
        limit_bytes=limit_bytes,
        host_limit_bytes=None,
        changes=(Saving("--micro-batch-size 2", 700 * MIB, fits=False),),
    )


def timed_step(step: int) -> Stepped:
    record = StepRecord(step, 4.0 - step / N_STEPS, 0.1, 0.003, (0.5, -0.25), (0.5, 0.5), label_tokens=100)
    return Stepped(TimedStep(record, wall_s=0.5, tokens=1000, peak_bytes=2 * GIB))


def events_of_a_run() -> Iterator[Event]:
    config = RunConfig(model="models/tiny one", data="a.jsonl", output_dir="out", max_steps=N_STEPS, load_in_8bit=True)
    plan = plan_of(6 * GIB)
    before, after = Metrics(64, 4.0, 0.5), Metrics(64, 1.5, 0.75)
    yield Planned(config, plan, "rtx", ("micro_batch_size is now 2",), (), ("the card has no bfloat16",))
    yield DataReady(DataReport("messages", 100, 90, 0, 10, 5000, 120), None)
    yield ModelReady("models/tiny one", 35, "cpu", "float32", "nf4", 0)
    yield Evaluated(0, before)
    yield MuChosen(MuProbe(0.003, float("nan"), (0.01, 0.003), (1.0, float("nan"))))
    yield from (timed_step(step) for step in range(N_STEPS))
    yield Evaluated(N_STEPS, after)
    yield Saved(N_STEPS, Path("out"))
    report = {
        "samples": SAMPLES,
        "steps": N_STEPS,
        "wall_s": 50.0,
        "tokens_per_s": 2000.0,
        "predicted_peak_bytes": 4 * GIB,
        "measured_peak_bytes": 2 * GIB,
        "limit_bytes": 6 * GIB,
    }
    yield Finished(Run(Path("out"), before, after, report))


def shown(*renderables: object) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


def watched(*, terminal: bool) -> str:
    stream = io.StringIO()
    environment = {"TERM": "xterm-256color"} if terminal else {}
    watch(
        events_of_a_run(),
        Console(
            file=stream,
            width=100,
            force_terminal=terminal,
            highlight=False,
            markup=False,
            _environ=environment,
        ),
    )
    return stream.getvalue()


def test_plain_output_has_no_control_characters() -> None:
    assert not [c for c in watched(terminal=False) if ord(c) < 32 and c != "\n"]


def test_plain_output_has_a_line_for_each_evaluation_and_for_some_steps() -> None:
    lines = watched(terminal=False).splitlines()
    assert len([line for line in lines if line.startswith("held out")]) == 2
    assert len([line for line in lines if line.startswith("step ")]) == PLAIN_STEP_LINES
    assert [line for line in lines if line.startswith("step ")][-1].startswith(
        f"step     {N_STEPS}/{N_STEPS}, loss 3.1"
    )


def test_a_run_in_python_is_shown_in_the_same_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show = agzo_edge.show_progress()
    for event in events_of_a_run():
        show(event)
    lines = [" ".join(line.split()) for line in watched(terminal=False).splitlines()]
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in printed if line not in lines] == []
    assert len(printed) >= len(lines) - 5  # a console of other width folds the table otherwise


@pytest.mark.parametrize("terminal", [True, False])
def test_a_watched_run_tells_what_it_found_and_what_came_of_it(terminal: bool) -> None:
    text = watched(terminal=terminal)
    told = (
        "4.00 GiB predicted peak of 6.00 GiB allowed",
        "largest: weights 3.00 GiB",
        "10 of 100 dropped",
        "Who [are] you?",
    )
    told += (
        "micro_batch_size is now 2",
        "the card has no bfloat16",
        "-62%",
        "Arr, matey!",
        "50% of the 4.00 GiB predicted",
        "50.0% -> 75.0%",
    )
    assert [part for part in told if part not in text] == []


def course_of(**settings: object) -> Course:
    course = Course()
    course.planned = Planned(RunConfig(**settings), plan_of(GIB), "rtx", (), ())
    return course


def test_an_end_that_is_not_the_best_says_so_and_where_the_best_is(tmp_path: Path) -> None:
    course = course_of(max_steps=60, early_stopping_patience=2, eval_data="b.jsonl")
    found = {"0": {"loss": 4.0}, "4": {"loss": 3.0}, "8": {"loss": 3.5}}
    report = {"steps": 8, "best_step": 4, "evaluations": found, "steps_without_signal": 0}
    run = Run(tmp_path, None, None, report)
    gone = shown(*ending_lines(run, course))
    assert "after step 8 of 60: no better in 2 evaluations" in gone
    assert "best" not in gone
    (tmp_path / "best").mkdir()
    assert f"loss 3.0000 after step 4, in {tmp_path / 'best'}" in shown(*ending_lines(run, course)).replace("\n", "")
    as_good = {"steps": 60, "evaluations": found | {"60": {"loss": 3.0}}}
    assert ending_lines(Run(tmp_path, None, None, report | as_good), course) == []
    lost = {"steps": 60, "evaluations": {"4": {"loss": None}, "60": {"loss": None}}}
    assert ending_lines(Run(tmp_path, None, None, report | lost), course) == []


@pytest.mark.parametrize(
    ("objective", "why"), [("lm", "no example's loss had changed"), ("reward", "same reward. Try")]
)
def test_steps_that_taught_nothing_are_told_of(objective: str, why: str) -> None:
    course = course_of(max_steps=9, objective=objective, reward="exact_match" if objective == "reward" else None)
    report = {"steps": 9, "best_step": None, "steps_without_signal": 8}
    text = " ".join(shown(*ending_lines(Run(Path("out"), None, None, report), course)).split())
    assert "nothing was learned in 8 of 9 steps: " in text
    assert why in text


def test_a_reward_is_told_as_one_and_no_change_is_no_fall(tmp_path: Path) -> None:
    course = course_of(objective="reward", reward="exact_match", max_steps=4)
    found = {"2": {"loss": -0.5}, "4": {"loss": 0.0}}
    report = {"steps": 4, "best_step": 2, "evaluations": found}
    (tmp_path / "best").mkdir()
    assert "reward 0.5000 after step 2" in shown(*ending_lines(Run(tmp_path, None, None, report), course))
    assert str(course.told(0.0)) == "0.0"
    before, after = Metrics(64, -0.25, reward=0.25), Metrics(64, -0.5, reward=0.5)
    assert "held-out reward 0.2500 ▁█ 0.5000" in shown(*before_after(before, after, course, [-0.25, -0.5]))
    course.planned = None
    still = shown(*before_after(Metrics(64, 4.8395), Metrics(64, 4.8394), course, [4.8395, 4.8394, 4.8394])).rstrip()
    assert still == "held-out loss   4.8395 ▁▁▁ 4.8394"


def test_no_color_leaves_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    environment = {"TERM": "xterm-256color", "NO_COLOR": "1"}
    watch(events_of_a_run(), Console(file=stream, width=100, force_terminal=True, _environ=environment))
    assert "\x1b[3" not in stream.getvalue()


def test_live_view_shows_progress_loss_curve_and_memory() -> None:
    course = Course()
    for event in events_of_a_run():
        course.take(event)
        if course.steps_done == 50:
            break
    text = shown(live_view(course))
    for part in ("50/100, training", "left", "2,000 tokens/s", "after step 0", "2.00 GiB of 6.00 GiB"):
        assert part in text


def test_live_view_says_what_is_done_before_the_first_step() -> None:
    course = Course()
    assert "reading the data" in shown(live_view(course))
    course.take(next(events_of_a_run()))
    assert "loading the model" in shown(live_view(course))


def test_json_has_an_object_for_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    watch_json(events_of_a_run())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(list(events_of_a_run()))
    assert {line["event"] for line in lines} == {
        "planned", "data", "model", "mu", "evaluated", "step", "saved", "finished",
    }  # fmt: skip
    assert lines[-1]["after"]["loss"] == 1.5


def test_json_holds_no_number_that_is_none() -> None:
    mu = next(event for event in events_of_a_run() if isinstance(event, MuChosen))
    assert json.loads(json_line(event_object(mu)))["noise_floor"] is None


@pytest.mark.parametrize(("noise_floor", "is_warned"), [(0.2, False), (0.5, True)])
def test_a_lost_signal_is_warned_of_with_what_to_do(noise_floor: float, is_warned: bool) -> None:
    told = "\n".join(line.plain for line in event_lines(MuChosen(MuProbe(0.01, noise_floor, (), ()))))
    assert f"noise floor {noise_floor}" in told
    assert ("--difference exact" in told) is is_warned


def test_generate_command_is_read_by_a_shell_as_written() -> None:
    config = RunConfig(model="my models/tiny", load_in_4bit=False, load_in_8bit=True, adapter="start")
    words = shlex.split(generate_command(config, "adapters/it's", "How are you?"))
    assert words[:4] == ["agzo-edge", "generate", "--model", "my models/tiny"]
    assert words[4:6] == ["--no-load-in-4bit", "--load-in-8bit"]
    assert words[6:] == ["--adapter", "adapters/it's", "--prompt", "How are you?"]


def test_generate_command_of_the_demo_names_no_model() -> None:
    assert "--model" not in generate_command(RunConfig(**demo_settings()), "out", "Hi")


def test_plan_table_has_every_component_and_a_sum_for_each_place() -> None:
    text = shown(plan_table(plan_of(6 * GIB), columns=100))
    for part in (
        "weights",
        "3.00 GiB",
        "8 rows x 512 tokens",
        "journal",
        "4.00 GiB  device",
        "1.0 MiB  disk",
    ):
        assert part in text


def test_plan_table_fits_40_columns_without_its_formulas() -> None:
    text = shown(plan_table(plan_of(6 * GIB), columns=40))
    assert "3.00 GiB" in text
    assert "rows x" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 40


def test_the_comparison_says_what_qlora_needs_and_whether_it_fits() -> None:
    need = QloraNeed(parts={"base": 4 * GIB, "logits": GIB}, smallest_bytes=3 * GIB)
    text = shown(comparison(replace(plan_of(4 * GIB), qlora=need)))
    assert "at least 5.00 GiB" in text
    assert "3.00 GiB with one example" in text
    assert "lower loss" in text
    assert "more than is allowed" in shown(comparison(replace(plan_of(2 * GIB), qlora=need)))


def test_a_plan_prints_as_what_matters() -> None:
    assert str(plan_of(6 * GIB)) == "4.00 GiB at the peak, 6.00 GiB allowed on gtx-1650-4gb: fits"
    assert str(plan_of(GIB)).endswith("does not fit")


def test_verdict_says_how_much_is_spare_or_too_much_and_what_to_do() -> None:
    assert "fits: 4.00 GiB" in shown(verdict(plan_of(6 * GIB)))
    assert "2.00 GiB to spare" in shown(verdict(plan_of(6 * GIB)))
    too_small = shown(verdict(plan_of(3 * GIB)))
    assert "does not fit" in too_small
    assert "1.00 GiB too much" in too_small
    assert "--micro-batch-size 2  saves 700.0 MiB" in too_small
    full = shown(verdict(replace(plan_of(6 * GIB), disk_limit_bytes=MIB // 2)))
    assert "1.0 MiB of the disk" in full
    assert "512.0 KiB may be used" in full
    in_pieces = replace(plan_of(3 * GIB), in_pieces=InPieces("micro-batches of 2", 2 * GIB))
    assert "fits in pieces" in shown(verdict(in_pieces))
    assert "micro-batches of 2: 2.00 GiB" in shown(verdict(in_pieces))


def test_curve_falls_from_the_highest_block_to_the_lowest() -> None:
    assert curve([4.0, 2.0, 1.0]) == "█▃▁"
    assert curve([]) == ""
    assert curve([2.0, 2.0]) == "▁▁"
    assert len(curve(list(range(1000)))) == 40
    assert curve([math.nan, 3.0, None, 1.0]) == "█▁"
    assert curve([math.nan]) == ""


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (8.4, 185, 7620)] == ["8 s", "3 min 05 s", "2 h 07 min"]


def test_facts_are_set_in_and_amounts_are_written_for_people() -> None:
    lines = shown(
        *facts_lines({"free_bytes": GIB, "tokens_per_s": 12.5, "gpu": {"name": "[x]"}, "advice": ["do this"]})
    )
    assert lines.splitlines() == [
        "free          1.00 GiB",
        "tokens per s  12.5",
        "gpu",
        "  name  [x]",
        "advice",
        "  1  do this",
    ]


def test_report_shows_the_curve_in_the_order_of_steps() -> None:
    evaluations = {str(step): {"loss": loss} for step, loss in ((100, 1.0), (0, 4.0), (20, 3.0))}
    text = shown(*report_lines({"steps": 100, "evaluations": evaluations, "samples": SAMPLES}))
    assert "4.0000 █▆▁ 1.0000" in text
    assert "Arr, matey!" in text


def test_a_rewards_prompts_are_not_said_to_hold_no_token_to_learn() -> None:
    report = DataReport("prompt", 3, 3, 0, 0, label_tokens=0, longest_tokens=9)
    assert data_line("data", report).plain.endswith(
        "3 rows (prompt), answers are judged, longest row 9 tokens, 0% padding"
    )
    texts = replace(report, format="text", label_tokens=1200)
    assert "1,200 tokens to learn" in data_line("data", texts).plain
    assert "1,200 tokens to score" in data_line("held out", texts).plain
