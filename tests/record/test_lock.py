"""One process in a run directory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agzo_edge.errors import AdapterError, AgzoError
from agzo_edge.record.lock import LOCK_NAME, RunLock

HOLD = """
import sys
from pathlib import Path
from agzo_edge.record.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(directory: Path) -> subprocess.Popen[str]:
    """Another process, in possession of the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def _locked(directory: Path) -> bool:
    try:
        with RunLock(directory):
            return False
    except AdapterError:
        return True


def test_a_second_process_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        with pytest.raises(AdapterError, match=rf"in use by the process with pid {process.pid}: wait"):
            RunLock(tmp_path).__enter__()
        process.communicate("")
        assert process.returncode == 0
    assert not _locked(tmp_path)


def test_the_lock_of_a_killed_process_locks_nobody_out(tmp_path: Path) -> None:
    with _holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_NAME).exists()
    assert not _locked(tmp_path)


def test_the_directory_is_made_and_the_lock_file_goes_with_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        assert lock.path.read_text() == f"{os.getpid()}\n"
        assert _locked(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_is_released_by_an_error_in_its_block(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    assert not _locked(tmp_path)


def test_a_holder_that_removed_its_file_is_not_mistaken_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open
    n_opened = 0

    def removed_just_after(path: Path, *args: int) -> int:
        nonlocal n_opened
        descriptor = opened(path, *args)
        n_opened += path.name == LOCK_NAME
        if path.name == LOCK_NAME and n_opened == 1:
            path.unlink()
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", removed_just_after)
        lock = RunLock(tmp_path).__enter__()
    assert n_opened == 2
    assert _locked(tmp_path)
    lock.__exit__(None, None, None)


def test_a_path_that_is_a_file_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(AgzoError, match="cannot be written"):
        RunLock(tmp_path / "run").__enter__()
