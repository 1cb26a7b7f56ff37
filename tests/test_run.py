"""Whole runs: begun, stopped, killed, resumed, replayed, loaded by PEFT."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load_file

import agzo_edge
from agzo_edge import demo
from agzo_edge.config import RunConfig, config_from
from agzo_edge.errors import (
    AdapterError,
    BudgetBrokenError,
    BudgetError,
    ConfigError,
    ModelError,
    NonFiniteLossError,
    RewardError,
)
from agzo_edge.events import DataReady, Evaluated, Event, Finished, Moved, Planned, Saved, Stepped, WentBack
from agzo_edge.record.journal import JournalWriter, read_journal
from agzo_edge.session import training
from agzo_edge.train.guard import Guard
from agzo_edge.train.step import agzo_step
from agzo_edge.train.template import Asking

STEPS = 9  # three windows of four, the last one open


def config_of(output_dir: Path, **settings: object) -> RunConfig:
    small = {
        "max_steps": STEPS,
        "refresh_every": 4,
        "batch_size": 4,
        "eval_steps": 0,
        "save_steps": 3,
        "mu": 0.01,
        "lr_schedule": "constant",
    }
    return config_from(demo.demo_settings(), small, {"eval_data": None, "output_dir": str(output_dir), **settings})


def trained(output_dir: Path, *, resume: bool = False, **settings: object) -> list[Event]:
    return list(training(config_of(output_dir, **settings), resume=resume))


def adapter_of(run_dir: Path) -> bytes:
    return (run_dir / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    trained(run_dir)
    return run_dir


def test_a_run_leaves_everything_that_the_design_lists(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert names >= {
        *("adapter_model.safetensors", "adapter_config.json", "README.md", "journal.jsonl", "report.json"),
        *("bases", "tokenizer.json", "tokenizer_config.json", "checkpoint-3", "checkpoint-6"),
    }
    assert not any(name.endswith(".partial") for name in names)
    report = json.loads((whole_run / "report.json").read_text())
    assert report["steps"] == STEPS
    assert report["predicted_peak_bytes"] > 0
    assert report["measured_peak_bytes"] > 0
    parts = report["memory"]
    assert list(parts) == ["libraries and data", "model", "learned", "a step's work"]
    assert sum(part["predicted_bytes"] for part in parts.values()) == report["predicted_peak_bytes"]
    assert sum(part["measured_bytes"] for part in parts.values()) == report["measured_peak_bytes"]


def test_the_same_run_twice_gives_the_same_adapter_to_the_byte(whole_run: Path, tmp_path: Path) -> None:
    trained(tmp_path / "again")
    assert adapter_of(tmp_path / "again") == adapter_of(whole_run)


@pytest.mark.parametrize("done", [1, 4, 7])
def test_a_stopped_run_resumes_to_the_same_bytes(whole_run: Path, tmp_path: Path, done: int) -> None:
    events = training(config_of(tmp_path / "run"))
    for event in events:
        if isinstance(event, Stepped) and event.timed.record.step + 1 == done:
            break
    events.close()
    resumed = trained(tmp_path / "run", resume=True)
    assert sum(isinstance(event, Stepped) for event in resumed) == STEPS - done
    assert adapter_of(tmp_path / "run") == adapter_of(whole_run)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "momentum"}, {"optimizer": "adam"}, {"target": "dequantized"}, {"guide": "head"}]
)
def test_every_learner_resumes_to_the_same_bytes(tmp_path: Path, settings: dict[str, str]) -> None:
    trained(tmp_path / "whole", **settings)
    events = training(config_of(tmp_path / "run", **settings))
    for event in events:
        if isinstance(event, Stepped) and event.timed.record.step == 5:
            break
    events.close()
    trained(tmp_path / "run", resume=True, **settings)
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole")


def test_a_guided_run_is_replayed_from_its_directory_and_from_one_file(tmp_path: Path) -> None:
    trained(tmp_path / "run", guide="head")
    agzo_edge.replay(tmp_path / "run", output=tmp_path / "replayed")
    file = agzo_edge.export(tmp_path / "run", to="replay", output=tmp_path / "run.safetensors")
    agzo_edge.replay(file, output=tmp_path / "from-file")
    assert adapter_of(tmp_path / "replayed") == adapter_of(tmp_path / "from-file") == adapter_of(tmp_path / "run")


@pytest.mark.parametrize("as_one_file", [False, True])
def test_a_replay_computes_with_the_threads_of_the_run(tmp_path: Path, as_one_file: bool) -> None:
    run = tmp_path / "run"
    trained(run, rank=8, adapter_rank=8, refresh_every=1)  # compressed often: a QR's last bits depend on threads
    threads = torch.get_num_threads()
    assert read_journal(run / "journal.jsonl").header["threads"] == threads == 1
    source = agzo_edge.export(run, to="replay", output=tmp_path / "run.safetensors") if as_one_file else run
    torch.set_num_threads(2)
    try:
        agzo_edge.replay(source, output=tmp_path / "replayed")
    finally:
        torch.set_num_threads(threads)
    assert adapter_of(tmp_path / "replayed") == adapter_of(run)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"guide": "head"}, {"load_in_8bit": True}])
def test_a_run_on_a_gpu_resumes_and_replays_to_the_same_bytes(tmp_path: Path, settings: dict[str, object]) -> None:
    settings = {"device": "cuda", "profile": "auto", **settings}
    trained(tmp_path / "whole", **settings)
    events = training(config_of(tmp_path / "run", **settings))
    next(event for event in events if isinstance(event, Stepped) and event.timed.record.step == 5)
    events.close()
    trained(tmp_path / "run", resume=True, **settings)
    agzo_edge.replay(tmp_path / "run", output=tmp_path / "replayed")
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole") == adapter_of(tmp_path / "replayed")


RUINOUS = {
    "learning_rate": 20.0,
    "normalize": False,
    "undo_every": 2,
    "refresh_every": 3,
    "batch_size": 16,
    "lr_schedule": "constant",
}


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_a_run_that_does_harm_goes_back_and_is_replayed_and_resumed_to_the_same_bytes(
    tmp_path: Path, optimizer: str
) -> None:
    held_out = str(demo.DATA_DIR / demo.VALID_NAME)
    settings = RUINOUS | {"optimizer": optimizer}
    events = trained(tmp_path / "whole", eval_data=held_out, **settings)
    went_back = [event for event in events if isinstance(event, WentBack)]
    assert went_back
    assert all(event.to_step < event.step for event in went_back)
    finished = next(event for event in events if isinstance(event, Finished))
    assert finished.run.report["times_gone_back"] == len(went_back)
    assert finished.run.after.loss <= finished.run.before.loss

    agzo_edge.replay(tmp_path / "whole", output=tmp_path / "replayed")
    file = agzo_edge.export(tmp_path / "whole", to="replay", output=tmp_path / "run.safetensors")
    agzo_edge.replay(file, output=tmp_path / "from-file")
    assert adapter_of(tmp_path / "replayed") == adapter_of(tmp_path / "from-file") == adapter_of(tmp_path / "whole")

    for last in range(1, 6):
        out = tmp_path / f"cut-{last}"
        cut = training(config_of(out, eval_data=held_out, **settings))
        next(event for event in cut if isinstance(event, Stepped) and event.timed.record.step == last)
        cut.close()
        trained(out, resume=True, eval_data=held_out, **settings)
        assert adapter_of(out) == adapter_of(tmp_path / "whole")


@pytest.mark.parametrize("told", [WentBack, Moved])
def test_whoever_stops_the_run_at_any_event_of_a_step_has_that_step_saved(
    told: type[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "whole", **RUINOUS)
    moves = iter([(), (), (), (), ("as asked for",)])
    monkeypatch.setattr(Guard, "take_moves", lambda _guard: next(moves, ()))
    out = tmp_path / "stopped"
    events = training(config_of(out, **RUINOUS))
    next(event for event in events if isinstance(event, told))
    events.close()
    n_steps = len((out / "journal.jsonl").read_text().splitlines()) - 1
    assert (out / f"checkpoint-{n_steps}").is_dir()
    trained(out, resume=True, **RUINOUS)
    assert adapter_of(out) == adapter_of(tmp_path / "whole")


def test_a_run_in_a_directory_with_a_dot_is_replayed_into_it(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run-2.5")
    assert agzo_edge.replay(tmp_path / "run-2.5") == tmp_path / "run-2.5" / "replayed"


def test_a_replay_gives_the_same_adapter_without_model_or_data(whole_run: Path, tmp_path: Path) -> None:
    agzo_edge.replay(whole_run, output=tmp_path / "replayed")
    assert adapter_of(tmp_path / "replayed") == adapter_of(whole_run)


def test_steps_that_the_run_has_not_cannot_be_left_out(whole_run: Path, tmp_path: Path) -> None:
    file = agzo_edge.export(whole_run, to="replay", output=tmp_path / "run.safetensors")
    for source in (whole_run, file):
        with pytest.raises(ConfigError, match=f"--skip names none of the run's {STEPS} steps"):
            agzo_edge.replay(source, output=tmp_path / "replayed", skip=range(STEPS, STEPS + 9))


def test_resuming_where_no_run_is_does_not_begin_the_demo(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to go on with: name --model and --data"):
        agzo_edge.finetune(output_dir=str(tmp_path / "nowhere"), resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_run_is_resumed_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_bytes((demo.DATA_DIR / demo.VALID_NAME).read_bytes())
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {"model": str(demo.MODEL_DIR), "data": "rows.jsonl", "lr_schedule": "constant", "mu": 0.01}
    agzo_edge.finetune(**settings, output_dir="run", max_steps=2, batch_size=2, undo_every=0)
    monkeypatch.chdir(tmp_path / "else")
    assert agzo_edge.finetune(output_dir="../run", resume=True, max_steps=3).report["steps"] == 3


def test_a_replay_beyond_the_last_step_is_refused(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"until-step is {STEPS + 1}, and the run has {STEPS} steps"):
        agzo_edge.replay(whole_run, output=tmp_path / "replayed", until_step=STEPS + 1)


def test_an_adapter_is_used_on_its_base_as_it_was_held_and_scored_by_its_runs_objective(tmp_path: Path) -> None:
    data = tmp_path / "choices.jsonl"
    data.write_text('{"prompt": "Is it a bird?", "options": [" yes", " no"], "answer": 0}\n' * 4)
    settings = {"objective": "choice", "load_in_4bit": False, "refresh_every": 1}
    events = trained(tmp_path / "run", data=str(data), eval_data=str(data), **settings)
    after = next(event.run.after for event in events if isinstance(event, Finished))
    scored = agzo_edge.evaluate(data=str(data), adapter=tmp_path / "run")
    assert scored.accuracy is not None
    assert scored.loss == pytest.approx(after.loss, rel=1e-6)
    agzo_edge.replay(tmp_path / "run", output=tmp_path / "replayed")
    agzo_edge.export(tmp_path / "run" / "best", to="peft", output=tmp_path / "peft")
    for place in ("run/best", "replayed", "peft"):
        assert agzo_edge.load(adapter=tmp_path / place).model.quantization == "none"
    assert agzo_edge.load(adapter=tmp_path / "run", load_in_8bit=True).model.quantization == "int8"
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Ahoy there, matey!"}\n')
    assert agzo_edge.evaluate(data=str(text), adapter=tmp_path / "run", objective="lm").accuracy is None


def test_an_adapter_is_asked_as_its_rows_were_wherever_it_is_taken(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "Is it a bird?", "completion": " Aye."}\n' * 4)
    events = trained(tmp_path / "run", data=str(data), refresh_every=1, max_steps=2)
    ready = next(event for event in events if isinstance(event, DataReady))
    assert ready.asking == Asking("plain", "Is it a bird?")
    assert "as they stand, without a chat template" in (tmp_path / "run" / "README.md").read_text()
    agzo_edge.replay(tmp_path / "run", output=tmp_path / "replayed")
    agzo_edge.export(tmp_path / "replayed", to="peft", output=tmp_path / "peft")
    for place in ("run", "replayed", "peft"):
        writer = agzo_edge.load(adapter=tmp_path / place)
        assert writer.model.tokenizer.chat_template is not None
        assert writer.form == "plain"
    assert agzo_edge.load().form is None


def test_torch_is_as_the_caller_had_it_and_the_run_as_ever(whole_run: Path, tmp_path: Path) -> None:
    settings = json.loads((whole_run / "journal.jsonl").read_text().splitlines()[0])["config"]
    given = {name: settings[name] for name in config_of(tmp_path).model_fields_set} | {
        "output_dir": str(tmp_path / "run")
    }
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            agzo_edge.finetune(**given)
            agzo_edge.replay(tmp_path / "run", output=tmp_path / "replayed")
            writer = agzo_edge.load(adapter=tmp_path / "run")
        assert torch.get_default_dtype() is torch.bfloat16
        assert torch.get_num_threads() == 2
        assert writer.threads == 1
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
    assert adapter_of(tmp_path / "run") == adapter_of(whole_run)
    assert adapter_of(tmp_path / "replayed") == adapter_of(whole_run)


def test_a_link_to_nowhere_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"is a link to .*nowhere, and nothing is there"):
        trained(tmp_path / "link")


def test_damaged_bases_are_told_of_with_what_can_be_had(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    bases = tmp_path / "run" / "bases" / f"step-{4:08d}.safetensors"
    bases.write_bytes(bases.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="can be had by `replay --until-step 4`"):
        agzo_edge.replay(tmp_path / "run", output=tmp_path / "replayed")
    agzo_edge.replay(tmp_path / "run", output=tmp_path / "until", until_step=4)


def test_an_adapter_finds_the_base_that_its_run_named_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(demo.MODEL_DIR, tmp_path / "models" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trained(Path("run"), model="models/tiny", max_steps=1)
    assert "base_model:" not in (tmp_path / "run" / "README.md").read_text(), "a directory is no hub id"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert agzo_edge.load(adapter=Path("../run")).model.source == str(tmp_path / "models" / "tiny")


def test_an_adapter_without_a_base_is_not_put_on_the_demos_model(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(config.read_text().replace(json.dumps(str(demo.MODEL_DIR)), '""'))
    with pytest.raises(ModelError, match="names no base model"):
        agzo_edge.load(adapter=tmp_path / "run")


def test_an_adapter_does_not_say_what_code_is_run(whole_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    header = dict(read_journal(run_dir / "journal.jsonl").header)
    header["config"] |= {"objective": "reward", "reward": "os:system", "early_stopping_patience": 3}
    (run_dir / "journal.jsonl").unlink()
    with JournalWriter.create(run_dir / "journal.jsonl", header):
        pass
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "touch ' + str(tmp_path / "ran") + '"}\n')
    with pytest.raises(AdapterError, match="os:system, code that is run only when you name it"):
        agzo_edge.evaluate(data=str(data), adapter=run_dir)
    with pytest.raises(AdapterError, match="os:system, code that is run only when you name it"):
        agzo_edge.finetune(output_dir=str(run_dir), resume=True)
    assert not (tmp_path / "ran").exists()
    (run_dir / "journal.jsonl").write_bytes(b"damaged\n")  # the adapter itself is sound
    assert agzo_edge.load(adapter=run_dir).model.quantization == "nf4"


def test_a_run_that_went_back_for_a_step_that_failed_goes_on_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = trained(tmp_path / "whole", **RUINOUS)
    went_back = next(event.step for event in events if isinstance(event, WentBack))
    asked = []

    def breaks(*arguments: object, **named: object) -> object:
        asked.append(named["step"])
        if named["step"] == went_back:
            raise BudgetBrokenError("no memory")
        return agzo_step(*arguments, **named)

    out = tmp_path / "broken"
    with monkeypatch.context() as patched:
        patched.setattr("agzo_edge.train.loop.agzo_step", breaks)
        with pytest.raises(BudgetBrokenError):
            trained(out, **RUINOUS, on_overflow="fail")
    assert asked[-1] == went_back
    trained(out, resume=True, **RUINOUS, on_overflow="fail")
    agzo_edge.replay(out, output=tmp_path / "replayed")
    assert adapter_of(out) == adapter_of(tmp_path / "replayed") == adapter_of(tmp_path / "whole")


@pytest.mark.parametrize("error", [NonFiniteLossError, RewardError])
def test_a_run_that_fails_in_a_step_leaves_what_it_had_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fails(*arguments: object, step: int, **named: object) -> object:
        if step == 2:
            raise error("row 3")
        return agzo_step(*arguments, step=step, **named)

    monkeypatch.setattr("agzo_edge.train.loop.agzo_step", fails)
    with pytest.raises(error):
        trained(tmp_path / "run", undo_every=0, save_steps=0)
    agzo_edge.load(adapter=tmp_path / "run" / "checkpoint-2")


def test_an_adapter_of_a_run_that_has_not_ended_is_no_adapter_yet(tmp_path: Path) -> None:
    events = training(config_of(tmp_path / "run"))
    next(event for event in events if isinstance(event, Stepped))
    events.close()
    with pytest.raises(AdapterError, match=r"has not ended.*--resume-from-checkpoint.*replay"):
        agzo_edge.load(adapter=tmp_path / "run")
    with pytest.raises(AdapterError, match="has not ended"):
        agzo_edge.export(tmp_path / "run", to="peft", output=tmp_path / "peft")


def test_a_replay_until_a_step_gives_that_checkpoint(whole_run: Path, tmp_path: Path) -> None:
    agzo_edge.replay(whole_run, output=tmp_path / "replayed", until_step=3)
    assert adapter_of(tmp_path / "replayed") == adapter_of(whole_run / "checkpoint-3")


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(whole_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    script = (
        "from pathlib import Path; from agzo_edge.config import RunConfig; from agzo_edge.session import training\n"
        f"for event in training(RunConfig.model_validate_json({config_of(run_dir).model_dump_json()!r})): pass"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    journal = run_dir / "journal.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = journal.read_bytes().count(b"\n") - 1
    resumed = trained(run_dir, resume=True)
    assert sum(isinstance(event, Stepped) for event in resumed) <= STEPS - begun
    assert adapter_of(run_dir) == adapter_of(whole_run)


def test_a_run_made_longer_and_stopped_is_not_reported_as_finished(tmp_path: Path) -> None:
    trained(tmp_path / "run", max_steps=2)
    assert agzo_edge.report(tmp_path / "run")["finished"]
    events = training(config_of(tmp_path / "run", max_steps=6), resume=True)
    next(event for event in events if isinstance(event, Stepped))
    events.close()
    assert not agzo_edge.report(tmp_path / "run")["finished"]


def test_a_run_can_be_made_longer(whole_run: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", max_steps=5)
    trained(tmp_path / "run", resume=True, reward_timeout_s=3.0)
    assert adapter_of(tmp_path / "run") == adapter_of(whole_run)


@pytest.mark.parametrize(
    ("changed", "named"), [({"seed": 7}, "seed"), ({"rank": 2}, "rank"), ({"max_seq_length": 50}, None)]
)
def test_resuming_another_run_is_refused_by_the_setting(
    tmp_path: Path, changed: dict[str, int], named: str | None
) -> None:
    trained(tmp_path / "run", max_steps=2)
    with pytest.raises(AdapterError, match=named or "max_seq_length"):
        trained(tmp_path / "run", resume=True, **changed)


def test_a_preset_named_while_resuming_is_another_run(whole_run: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(AdapterError, match=r"learning_rate was 0\.1 and is 0\.2 now"):
        agzo_edge.finetune(output_dir=str(run_dir), preset="fast", resume=True)


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", max_steps=2)
    with pytest.raises(AdapterError, match="training data has changed"):
        trained(tmp_path / "run", resume=True, data=str(demo.DATA_DIR / demo.VALID_NAME))


def test_a_directory_with_another_run_is_refused(whole_run: Path) -> None:
    before = adapter_of(whole_run)
    with pytest.raises(AdapterError, match="resume-from-checkpoint"):
        trained(whole_run)
    assert adapter_of(whole_run) == before


def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded_or_written(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="MiB"):
        trained(tmp_path / "run", ram_limit="20MiB")
    assert not (tmp_path / "run").exists()


def test_peft_loads_the_adapter_and_gives_our_logits(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained(tmp_path / "run", load_in_4bit=False)
    ours = agzo_edge.load(str(demo.MODEL_DIR), adapter=tmp_path / "run", load_in_4bit=False).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21 on transformers 5.23 warns about its own use of it
        base = AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "run")
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits
        logits = ours.logits(ours.hidden_states(ids))
        untouched = base.get_base_model() if hasattr(base, "get_base_model") else None
    assert untouched is None or untouched is not base
    assert (logits - expected).norm() <= 1e-4 * expected.norm()


def test_an_adapter_can_be_trained_further(whole_run: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", adapter=str(whole_run), max_steps=2, seed=1)
    agzo_edge.replay(tmp_path / "run", output=tmp_path / "replayed")
    assert adapter_of(tmp_path / "replayed") == adapter_of(tmp_path / "run")
    first = load_file(whole_run / "adapter_model.safetensors")
    further = load_file(tmp_path / "run" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_"

    def change(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return tensors[key + "B.weight"] @ tensors[key + "A.weight"]

    moved = (change(further) - change(first)).norm()
    assert 0 < moved < change(first).norm(), "two small steps from the adapter, not from nothing"


def test_a_run_that_began_with_an_adapter_is_resumed_without_it_and_where_its_model_is_now(
    whole_run: Path, tmp_path: Path
) -> None:
    first = shutil.copytree(whole_run, tmp_path / "first")
    models = [shutil.copytree(demo.MODEL_DIR, tmp_path / name) for name in ("model", "moved")]
    settings = {"adapter": str(first), "max_steps": 4, "target_modules": ("o_proj", "down_proj"), "seed": 1}
    trained(tmp_path / "whole", model=str(models[0]), **settings)
    events = training(config_of(tmp_path / "run", model=str(models[0]), **settings))
    next(event for event in events if isinstance(event, Stepped))
    events.close()
    shutil.rmtree(first)
    shutil.rmtree(models[0])
    trained(tmp_path / "run", resume=True, model=str(models[1]), **settings)
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole")
    agzo_edge.load(adapter=tmp_path / "run")  # on the model as the run knows it now


def test_an_adapter_wider_than_the_cap_is_refused(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapter-rank"):
        trained(tmp_path / "run", adapter=str(whole_run), adapter_rank=4)


def test_the_dequantized_target_leaves_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    events = trained(tmp_path / "run", target="dequantized", eval_data=str(demo.DATA_DIR / demo.VALID_NAME))
    finished = next(event for event in events if isinstance(event, Finished))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    loss = agzo_edge.evaluate(
        str(tmp_path / "run" / "merged"), str(demo.DATA_DIR / demo.VALID_NAME), load_in_4bit=False
    ).loss
    assert merged.config.model_type == "qwen3"
    assert finished.run.after is not None
    assert loss == pytest.approx(finished.run.after.loss, rel=1e-4)


def test_the_demo_learns_its_voice(tmp_path: Path) -> None:
    events = trained(
        tmp_path / "run", max_steps=60, refresh_every=25, batch_size=8, eval_data=str(demo.DATA_DIR / demo.VALID_NAME)
    )
    losses = [event.metrics.loss for event in events if isinstance(event, Evaluated)]
    assert losses[-1] < 0.75 * losses[0]
    assert any(isinstance(event, Saved) for event in events)


def test_a_run_in_one_file_gives_the_same_adapter(whole_run: Path, tmp_path: Path) -> None:
    file = agzo_edge.export(whole_run, to="replay", output=tmp_path / "new" / "run")  # a name without a suffix
    replayed = agzo_edge.replay(file)
    assert replayed == tmp_path / "new" / "run-replayed"
    assert adapter_of(replayed) == adapter_of(whole_run)
    with pytest.raises(AdapterError, match=r"choose another --output$"):
        agzo_edge.replay(file)


def test_a_wrong_wish_to_export_is_refused_by_name(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to is replay, which has no dtype"):
        agzo_edge.export(whole_run, to="replay", output=tmp_path / "run", dtype="float16")
    with pytest.raises(ConfigError, match="choose one of peft, merged, gguf, replay"):
        agzo_edge.export(whole_run, to="onnx", output=tmp_path / "run")


def test_skipped_steps_leave_the_sum_and_nothing_else(whole_run: Path, tmp_path: Path) -> None:
    agzo_edge.replay(whole_run, output=tmp_path / "none", skip=range(STEPS))
    assert all(
        not tensor.any()
        for name, tensor in load_file(tmp_path / "none" / "adapter_model.safetensors").items()
        if "lora_B" in name
    )
    agzo_edge.replay(whole_run, output=tmp_path / "late", skip=range(3, STEPS))
    assert_same_change(tmp_path / "late", whole_run / "checkpoint-3")


def assert_same_change(one: Path, other: Path) -> None:
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    for name in (name.removesuffix("A.weight") for name in first if name.endswith("lora_A.weight")):
        change, expected = (t[name + "B.weight"] @ t[name + "A.weight"] for t in (first, second))
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6)


def test_skipping_is_refused_where_steps_depend_on_each_other(tmp_path: Path) -> None:
    trained(tmp_path / "run", optimizer="momentum", max_steps=2)
    with pytest.raises(ConfigError, match="sgd"):
        agzo_edge.replay(tmp_path / "run", output=tmp_path / "replayed", skip=range(1))
    assert not (tmp_path / "replayed").exists()


def test_a_damaged_checkpoint_is_named_and_the_journal_suffices_without_it(whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    state = tmp_path / "run" / "checkpoint-6" / "learner_state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(AdapterError, match="checkpoint-6"):
        trained(tmp_path / "run", resume=True, max_steps=STEPS + 1)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    trained(tmp_path / "run", resume=True, reward_timeout_s=3.0)
    assert adapter_of(tmp_path / "run") == adapter_of(whole_run)


def test_a_missing_tensorboard_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        next(training(config_of(tmp_path / "run", report_to="tensorboard")))


def test_tensorboard_gets_the_runs_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra; CI has it")
    trained(tmp_path / "run", max_steps=2, report_to="tensorboard")
    assert [path.name for path in (tmp_path / "run" / "runs").iterdir()], "an event file"


def test_a_limit_that_is_passed_ends_the_run_and_it_can_be_resumed(tmp_path: Path) -> None:
    events = training(config_of(tmp_path / "run", ram_limit="16GiB", on_overflow="fail"))
    next(event for event in events if isinstance(event, Stepped))
    assert events.gi_frame is not None
    events.gi_frame.f_locals["session"].guard.limit_bytes = 1  # as if all of it were passed by the step that was taken
    with pytest.raises(BudgetBrokenError, match="resume-from-checkpoint") as broken:
        next(events)
    assert "--max-seq-length" not in str(broken.value), "a resumed run has the same rows"
    assert len(trained(tmp_path / "run", resume=True)) > 0


def test_a_run_steps_down_when_memory_gets_scarce_and_learns_the_same(tmp_path: Path, whole_run: Path) -> None:
    events = training(config_of(tmp_path / "run"))
    next(event for event in events if isinstance(event, Stepped))
    assert events.gi_frame is not None
    guard = events.gi_frame.f_locals["session"].guard
    guard._spare_bytes = 2**60  # as if others had taken everything
    moved = [event for event in events if isinstance(event, Moved)]
    assert [event.step for event in moved] == [1]
    assert "only 0 B are left" in moved[0].what
    ours, whole = (load_file(run / "adapter_model.safetensors") for run in (tmp_path / "run", whole_run))
    for a in (name for name in whole if "lora_A" in name):
        b = a.replace("lora_A", "lora_B")  # the factors may turn against each other, their product does not
        assert relative_error(ours[b] @ ours[a], whole[b] @ whole[a]) < 0.05


def test_rows_that_fit_on_no_rung_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    events = training(config_of(tmp_path / "run"))
    planned = next(event for event in events if isinstance(event, Planned))
    object.__setattr__(planned.rungs[0].plan, "limit_bytes", 1)  # a plan that was wrong
    with pytest.raises(BudgetError, match="Nothing was learned; try"):
        list(events)
    assert not (tmp_path / "run").exists()


def test_a_finished_dequantized_run_can_be_made_longer(tmp_path: Path) -> None:
    trained(tmp_path / "run", target="dequantized", max_steps=2)
    trained(tmp_path / "run", target="dequantized", max_steps=4, resume=True)
    trained(tmp_path / "whole", target="dequantized", max_steps=4)
    merged = Path("merged") / "model.safetensors"
    assert (tmp_path / "run" / merged).read_bytes() == (tmp_path / "whole" / merged).read_bytes()
