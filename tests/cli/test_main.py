import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agzo_edge.cli import main

ESCAPE = "\x1b"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.out, captured.err


def modules_after(*arguments: str) -> set[str]:
    """The modules that a command leaves imported, asked in a process of its own."""
    code = (
        "import sys\nfrom agzo_edge.cli import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('modules:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("modules:", 1)[1].split())


@pytest.mark.parametrize("arguments", [("train", "--help"), ("profiles",), ("plan",), ("plan", "--sweep")])
def test_commands_that_load_nothing_do_not_wait_for_torch(arguments: tuple[str, ...]) -> None:
    assert not modules_after(*arguments) & {"torch", "transformers", "bitsandbytes", "datasets"}


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    assert "Usage: agzo-edge" in out


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert (code, out.split()[0]) == (0, "agzo-edge")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "--lerning-rate", "1"), "--learning-rate"),
        (("trian",), "Did you mean 'train'"),
        (("plan", "--rank", "many"), "--rank"),
        (("plan", "--rank", "900", "--vram-limit", "6"), "has no unit"),
        (("plan", "--noise", "loud"), "gaussian"),
        (("plan", "--preset", "best"), "paper"),
        (("plan", "--model", "/no/such/model"), "no such directory"),
        (("profiles", "show", "rtx-3060"), "rtx-3060-12gb"),
        (("profiles", "show"), "needs a name"),
        (("generate", "--prompt", "Hi", "--compare"), "--adapter"),
    ],
)
def test_wrong_usage_is_one_message_on_stderr(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert told in err
    assert "Traceback" not in err


def test_all_wrong_settings_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "plan", "--rank", "900", "--momentum", "2", "--vram-limit", "6")
    assert "rank:" in err
    assert "momentum:" in err
    assert "vram_limit:" in err


def test_an_error_is_an_object_on_stdout_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("plan", "--json", "--rank", "900"), ("plan", "--json", "--rnk", "9")):
        code, out, _ = run(capsys, *arguments)
        assert code == json.loads(out)["error"]["exit_code"] == 2


def test_a_plan_that_does_not_fit_ends_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--profile", "gtx-1650-4gb", "--vram-limit", "1MiB")
    assert code == 3
    assert "does not fit" in out
    code, out, _ = run(capsys, "estimate", "--profile", "gtx-1650-4gb", "--vram-limit", "1MiB", "--json")
    assert code == 3
    assert json.loads(out)["fits"] is False


def test_a_dry_run_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--profile", "gtx-1650-4gb", "--json")
    plans = [json.loads(run(capsys, *command, *flags)[1]) for command in (("train", "--dry-run"), ("plan",))]
    for plan in plans:
        del plan["disk_limit_bytes"]  # others write to the disk as well
    assert plans[0] == plans[1]


def test_profiles_are_listed_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "profiles")
    assert code == 0
    assert "rtx-3060-12gb" in out
    assert ESCAPE not in out


def test_a_shown_profile_is_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).resolve().parents[2] / "profiles" / "rtx-3060-12gb.toml"
    assert run(capsys, "profiles", "show", "rtx-3060-12gb")[1] == file.read_text(encoding="utf-8")


def test_a_profile_of_ones_own_is_shown_by_its_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[2] / "profiles" / "rtx-3060-12gb.toml"
    own = tmp_path / "my.toml"
    own.write_bytes(shipped.read_bytes())
    assert run(capsys, "profiles", "show", str(own))[1] == shipped.read_text(encoding="utf-8")
    code, _, err = run(capsys, "profiles", "show", str(tmp_path / "none.toml"))
    assert code == 2
    assert "no such file" in err


def test_signal_handlers_come_back_after_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(capsys, "profiles")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_stopped_run_is_saved_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "agzo_edge",
        "train",
        "--json",
        "--max-steps",
        "10000",
        "--output-dir",
        "my run",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        events = []
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1].get("event") == "step":
                process.send_signal(signal.SIGTERM)
                break
        rest, messages = process.communicate()
    events += [json.loads(line) for line in rest.splitlines()]
    assert process.returncode == events[-1]["error"]["exit_code"] == 143
    assert [event["event"] for event in events[:3]] == ["data", "planned", "model"]
    steps = [event["step"] for event in events if event.get("event") == "step"]
    assert (tmp_path / "my run" / f"checkpoint-{steps[-1]}").is_dir()
    assert messages.startswith("error: stopped by")
    assert len(messages.splitlines()) == 1  # no library speaks
    assert messages.endswith("go on with --output-dir 'my run' --resume-from-checkpoint\n")


@pytest.mark.parametrize("columns", ["40", "80", "110", "200"])
def test_help_never_cuts_a_flags_name_short(columns: str) -> None:
    code = "from agzo_edge.cli import main\nmain(['train', '--help'])"
    told = {**os.environ, "COLUMNS": columns, "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=told)
    assert "…" not in done.stdout
    for flag in ("--resume-from-checkpoint", "--no-trust-remote-code", "--early-stopping-patience"):
        assert flag in done.stdout


@pytest.mark.parametrize(("flag", "here"), [("--lr", "--learning-rate"), ("--num-train-epochs", "--max-steps")])
def test_a_flag_by_the_name_that_other_trainers_have_for_it_is_told_the_one_here(
    capsys: pytest.CaptureFixture[str], flag: str, here: str
) -> None:
    code, _, told = run(capsys, "train", flag, "3")
    assert code == 2
    assert f"No such option: {flag}; here it is {here}" in told
    assert "here it is" not in run(capsys, "profiles", flag, "3")[2]  # which has no such thing
