"""Whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from agzo_edge.errors import AdapterError, AgzoError
from agzo_edge.record.files import atomic_write_bytes, atomic_write_text, inside


def test_a_written_file_is_there_and_nothing_else_is(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.json", "grüße\n")
    assert (tmp_path / "a.json").read_bytes() == "grüße\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("call", ["open", "write", "fdatasync", "fsync", "replace"])
def test_a_disk_that_fills_up_at_any_call_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.bin"
    atomic_write_bytes(path, b"before")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "replace":
            patch.setattr(Path, call, full)
        else:
            patch.setattr(os, call, full)
        with pytest.raises(AgzoError, match=r"a\.bin.*No space left.*intact; free space"):
            atomic_write_bytes(path, b"after")
    after_rename = call == "fsync"  # of the directory: the new file has its name already, whole
    assert path.read_bytes() == (b"after" if after_rename else b"before")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_write_that_the_kernel_takes_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
        atomic_write_bytes(tmp_path / "a.bin", b"0123456789")
    assert (tmp_path / "a.bin").read_bytes() == b"0123456789"


def test_what_a_killed_write_left_aside_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.partial").write_bytes(b"longer than what comes now")
    atomic_write_bytes(tmp_path / "a.bin", b"now")
    assert (tmp_path / "a.bin").read_bytes() == b"now"


def test_a_missing_directory_is_a_message_and_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(AgzoError, match="cannot be written: No such file or directory"):
        atomic_write_bytes(tmp_path / "none" / "a.bin", b"")


@pytest.mark.parametrize("name", ["a.json", "bases/0.safetensors", "..a", "ä b.json"])
def test_a_plain_name_stays_inside(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "a//b", "a/", "C:a", "..\\a", "\0", "link/a"]
)
def test_a_name_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    with pytest.raises(AdapterError, match="leads outside"):
        inside(tmp_path / "run", name)
