"""The commands end to end, on the demo's model and data."""

import io
import json
import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint
from rich.console import Console

from agzo_edge.cli import main
from agzo_edge.cli.chat import converse
from agzo_edge.cli.consoles import say, write_json
from agzo_edge.config import Sampling
from agzo_edge.errors import ModelError
from agzo_edge.serve.generate import Message

FEW_STEPS = ("--max-steps", "2", "--eval-steps", "0", "--batch-size", "2", "--mu", "0.01", "--seed", "3")


def run(arguments: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_what_train_prints_last_writes_text_and_its_run_can_be_reported_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", *FEW_STEPS]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "held-out loss" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[0] == "agzo-edge"

    assert run([*command[1:], "--max-new-tokens", "3", "--compare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"prompt", "text", "without_adapter"}

    assert run(["report", "adapters/demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert run(["report", "adapters/demo"]) == 0
    assert "measured peak" in capsys.readouterr().out

    assert run(["replay", "adapters/demo", "--output", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "again"}
    trained, replayed = (Path(d, "adapter_model.safetensors").read_bytes() for d in ("adapters/demo", "again"))
    assert trained == replayed

    assert run(["eval", "--adapter", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] > 0


def test_a_run_is_resumed_by_its_directory_alone_with_the_settings_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "lines.jsonl"
    data.write_text('{"text": "one line"}\n{"text": "another line"}\n')
    out = ("--output-dir", str(tmp_path / "a run"))
    flags = ("--model", str(tiny_checkpoint("llama")), "--data", str(data), "--rank", "3", "--no-load-in-4bit")
    assert run(["train", *FEW_STEPS, *flags, "--lr-schedule", "constant", "--max-seq-length", "48", *out]) == 0
    capsys.readouterr()
    assert run(["train", *out, "--resume-from-checkpoint", "--max-steps", "3", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [3]


def test_a_question_without_an_answer_ends_like_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "lines.jsonl"
    data.write_text('{"text": "one line"}\n{"text": "another line"}\n')
    flags = ("--model", str(tiny_checkpoint("llama")), "--data", str(data), "--output-dir", str(tmp_path / "run"))
    assert run(["train", *FEW_STEPS, *flags, "--max-seq-length", "48"]) == 0
    (tmp_path / "run" / "report.json").unlink()
    for name in ("stdin", "stdout"):
        stream = io.StringIO()
        stream.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(f"sys.{name}", stream)
    assert run(["train", "--output-dir", str(tmp_path / "run")]) == 130
    assert "no answer" in capsys.readouterr().err


def test_compare_answers_first_with_the_adapters_own_base_as_the_run_held_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_checkpoint("llama"))
    data = tmp_path / "lines.jsonl"
    data.write_text('{"text": "one line"}\n{"text": "another line"}\n')
    flags = ("--model", model, "--data", str(data), "--no-load-in-4bit", "--max-seq-length", "48")
    assert run(["train", *FEW_STEPS, *flags, "--output-dir", str(tmp_path / "run")]) == 0
    say = ("--prompt", "one", "--max-new-tokens", "8", "--json")
    capsys.readouterr()
    assert run(["generate", "--model", model, "--no-load-in-4bit", *say]) == 0
    alone = json.loads(capsys.readouterr().out)["text"]
    assert run(["generate", "--adapter", str(tmp_path / "run"), "--compare", *say]) == 0
    assert json.loads(capsys.readouterr().out)["without_adapter"] == alone


class Echo:
    """A model that answers with the number of messages it was given, and takes at most three."""

    def generate(self, messages: Sequence[Message], *, sampling: Sampling, on_text: Callable[[str], object]) -> None:
        if len(messages) > 3:
            raise ModelError("too long")
        on_text(f"{len(messages)} messages, ")
        if messages[-1]["content"] == "stop":
            signal.raise_signal(signal.SIGINT)
        on_text(f"{sampling.max_new_tokens} tokens")


def conversation(monkeypatch: pytest.MonkeyPatch, entered: str, **settings: str) -> list[str]:
    """The lines that a chat shows."""
    model: Any = Echo()
    monkeypatch.setattr("sys.stdin", io.StringIO(entered))
    console = Console(file=io.StringIO(), width=80)
    converse(model, Sampling(max_new_tokens=9), console, **settings)
    lines: list[str] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return lines


def test_chat_keeps_its_history_until_reset_and_survives_a_conversation_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert conversation(monkeypatch, "one\n\ntwo\nthree\n/reset\nfour\n") == [
        "1 messages, 9 tokens",
        "3 messages, 9 tokens",
        "too long; or /reset",
        "1 messages, 9 tokens",
    ]


def test_a_system_message_outlives_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = conversation(monkeypatch, "one\n/reset\ntwo\n", system="Be brief.")
    assert shown == ["2 messages, 9 tokens", "2 messages, 9 tokens"]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert conversation(monkeypatch, "stop\nmore\n") == ["1 messages, ", "3 messages, 9 tokens"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_prompt_is_read_from_stdin_whatever_its_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    model = ("--model", str(tiny_checkpoint("llama")))
    assert run(["generate", *model, "--prompt", "-", "--max-new-tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "caf\ufffd"


def test_text_is_written_to_the_byte_and_json_in_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\tb\rc\n")
    write_json({"text": "é"})
    assert capsys.readouterr().out == 'a\tb\rc\n\n{"text": "\\u00e9"}\n'


def test_sampling_flags_are_the_fields_of_sampling_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "chat"):
        assert run([command, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for name in Sampling.model_fields:
            assert "--" + name.replace("_", "-") in shown
        assert "default: 256" in shown


def test_doctor_with_numerics_shows_the_error_over_mu_and_advises(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--no-load-in-4bit", "--dtype", "bfloat16", "--batch-size", "8")
    assert run(["doctor", "--numerics", *model, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert len(seen["sizes"]) == len(seen["errors"])
    assert seen["error_of_auto"] == seen["errors"][seen["sizes"].index(seen["probe"]["mu"])]
    assert run(["doctor", "--numerics", *model]) == 0
    out = capsys.readouterr().out
    marked = [line for line in out.splitlines() if "<- mu auto" in line]
    assert [float(line.split()[0]) for line in marked] == [seen["probe"]["mu"]]
    assert seen["advice"] in out


def test_doctor_has_no_numerics_of_a_reward(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--numerics", "--objective", "reward", "--reward", "exact_match"]) == 2
    assert "ask about another objective" in capsys.readouterr().err


def test_doctor_refuses_a_model_that_it_would_not_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--model", "some/model"]) == 2
    assert "--model some/model needs --numerics" in capsys.readouterr().err
