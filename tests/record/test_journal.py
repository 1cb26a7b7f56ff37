"""The journal: what was appended comes back, and nothing else does."""

import errno
import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agzo_edge.errors import AdapterError, AgzoError
from agzo_edge.record import journal as journal_module
from agzo_edge.record.journal import Journal, JournalWriter, read_journal

HEADER = {"config": {"rank": 4, "model": "grüße/x"}, "layers": [[64, 32]]}
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
FIELDS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name not in ("step", "crc")),
    st.lists(FLOAT32, max_size=3) | st.integers() | st.text(max_size=8) | st.none() | FLOAT32,
    max_size=3,
)


def _records(n_steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "lr": 0.1, "projected": [0.1 * step, -1e-7]} for step in range(n_steps)]


def _written(path: Path, records: Sequence[dict[str, Any]]) -> bytes:
    """The bytes of a journal of these records."""
    path.unlink(missing_ok=True)
    with JournalWriter.create(path, HEADER) as writer:
        for record in records:
            writer.append(record)
    return path.read_bytes()


def _checked(text: bytes) -> bytes:
    """A line with a right checksum, whatever its text."""
    return text[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(text)


def _read(path: Path, content: bytes) -> Journal:
    path.write_bytes(content)
    return read_journal(path)


@settings(max_examples=25)
@given(fields=st.lists(FIELDS, max_size=3))
def test_what_was_appended_comes_back(tmp_path_factory: pytest.TempPathFactory, fields: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("run") / "journal.jsonl"
    records = [{"step": i} | field for i, field in enumerate(fields)]
    content = _written(path, records)
    journal = read_journal(path)
    assert repr(journal.records) == repr(records)  # repr tells -0.0 from 0.0 and 1 from 1.0
    assert journal == Journal(HEADER, records, 0, len(content))
    assert journal.next_step == len(records)


@given(st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("<f", struct.pack("<I", bits))[0]))
def test_a_float32_comes_back_bit_for_bit(value: float) -> None:
    if value - value == 0:  # finite
        read = json.loads(json.dumps(value))
        assert struct.pack("<f", read) == struct.pack("<f", value)


def test_each_line_is_json_with_its_checksum_last(tmp_path: Path) -> None:
    lines = _written(tmp_path / "journal.jsonl", _records(2)).splitlines()
    for line in lines:
        fields = json.loads(line)
        assert list(fields)[-1] == "crc"
        body, _ = line.split(b',"crc":')
        assert fields["crc"] == f"{zlib.crc32(body + b'}'):08x}"


def test_a_cut_at_every_byte_gives_every_whole_record_before_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    records = _records(3)
    content = _written(path, records)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        n_lines = sum(end <= cut for end in ends)
        if n_lines == 0:
            with pytest.raises(AdapterError, match="line 1 is no sound header"):
                _read(path, content[:cut])
            continue
        journal = _read(path, content[:cut])
        assert journal.records == records[: n_lines - 1]
        assert journal.torn_bytes == cut - ends[n_lines - 1]
        assert journal.sound_bytes == ends[n_lines - 1]


def test_every_change_of_one_byte_of_a_line_is_seen() -> None:
    line = journal_module._line(_records(1)[0])
    for position in range(len(line)):
        for mask in range(1, 256):
            changed = bytearray(line)
            changed[position] ^= mask
            assert journal_module._fields(bytes(changed), "line 1") is None


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF, ord("\n") ^ ord(" ")])
def test_a_changed_byte_is_an_error_or_a_counted_loss_at_the_end(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "journal.jsonl"
    records = _records(3)
    content = _written(path, records)
    start_of_the_end = content.rindex(b"\n", 0, content.rindex(b"\n"))  # the newline before the last line
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= mask
        try:
            journal = _read(path, bytes(changed))
        except AdapterError:
            continue
        assert position >= start_of_the_end
        assert journal.torn_bytes > 0
        assert journal.records == records[: len(journal.records)]
        assert len(journal.records) >= (1 if position == start_of_the_end else 2)


def test_resume_cuts_the_torn_end_off_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = _written(path, _records(4))
    path.write_bytes(whole[:-5])
    with JournalWriter.resume(path) as writer:
        assert writer.next_step == 3
        writer.append(_records(4)[3])
    assert path.read_bytes() == whole


def test_resume_refuses_a_damaged_line_before_a_good_one_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    content = _written(path, _records(3)).replace(b'"step":1', b'"step":9')
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="line 4 follows a damaged line"):
        JournalWriter.resume(path)
    assert path.read_bytes() == content


HEADER_LINE = _checked(b'{"format":"agzo-edge journal","format_version":2,"first_step":0}')


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (b"", "line 1 is no sound header"),
        (_checked(b'{"format":"agzo-edge journal","format_version":1,"first_step":0}'), "version 1; this"),
        (_checked(b'{"format":"other","format_version":2,"first_step":0}'), "'other'"),
        (_checked(b'{"format":"agzo-edge journal","format_version":2,"first_step":-1}'), "first_step is -1"),
        (_checked(b'{"format":"agzo-edge journal","format_version":2}'), "first_step is None"),
        (HEADER_LINE + _checked(b'{"step":1}'), "line 2: step is 1, and 0 was due"),
        (HEADER_LINE + _checked(b'{"step":false}'), "step is False"),
        (HEADER_LINE + _checked(b'{"step":0.0}'), "step is 0.0"),
        (HEADER_LINE + _checked(b'{"loss":1}'), "step is None"),
        (HEADER_LINE + _checked(b'{"step":0}') * 2, "line 3: step is 0, and 1 was due"),
        (HEADER_LINE + _checked(b'{"step":0,"x":NaN}'), "line 2: holds NaN"),
        (HEADER_LINE + _checked(b'{"step":0,"x":1e400}'), "line 2: holds 1e400"),
        (HEADER_LINE + _checked(b'{"step":0,"x":1,"x":1}'), "line 2: gives the field 'x' twice"),
        (HEADER_LINE + _checked(b'{"step":0,"crc":"00000000"}'), "line 2: gives the field 'crc' twice"),
        (HEADER_LINE + _checked(b'{"step":0,"x":"\xff"}'), "line 2: .*decode"),
        (HEADER_LINE + b"\n" + _checked(b'{"step":0}'), "line 3 follows a damaged line"),
    ],
)
def test_anything_else_that_is_wrong_is_named_with_its_line(tmp_path: Path, lines: bytes, fault: str) -> None:
    with pytest.raises(AdapterError, match=fault):
        _read(tmp_path / "journal.jsonl", lines)


def test_a_line_past_the_limit_is_neither_read_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    content = _written(path, _records(1))
    monkeypatch.setattr(journal_module, "MAX_LINE_BYTES", 1000)
    with JournalWriter.resume(path) as writer, pytest.raises(ValueError, match="than a journal's longest"):
        writer.append({"step": 1, "x": "x" * 1000})
    assert path.read_bytes() == content
    with pytest.raises(AdapterError, match="line 3 is longer than"):
        _read(path, content + b"x" * 1001)


def _full(descriptor: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_after_10_bytes() -> Callable[[int, bytes], int]:
    write, n_calls = os.write, iter(range(100))
    return lambda file, data: write(file, data[:10]) if next(n_calls) == 0 else _full(file, data)


@pytest.mark.parametrize("can_truncate", [True, False])
@pytest.mark.parametrize("is_partial", [True, False])
def test_a_full_disk_leaves_the_earlier_steps_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_partial: bool, can_truncate: bool
) -> None:
    path = tmp_path / "journal.jsonl"
    records = _records(3)
    content = _written(path, records[:2])
    writer = JournalWriter.resume(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _full_after_10_bytes() if is_partial else _full)
        if not can_truncate:
            patch.setattr(os, "ftruncate", _full)
        with pytest.raises(AgzoError, match=r"journal\.jsonl.*No space left.*free space"):
            writer.append(records[2])
    journal = read_journal(path)
    assert journal.records == records[:2]
    assert journal.torn_bytes == (10 if is_partial and not can_truncate else 0)
    with pytest.raises(AgzoError, match="closed"):
        writer.append(records[2])
    with JournalWriter.resume(path) as resumed:
        resumed.append(records[2])
    assert path.read_bytes().startswith(content)
    assert read_journal(path).records == records


def test_an_append_that_was_not_synced_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    content = _written(path, _records(1))

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    writer = JournalWriter.resume(path)
    monkeypatch.setattr(os, "fdatasync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.append({"step": 1})
    assert path.read_bytes() == content


@pytest.mark.parametrize("record", [{"step": 0, "x": float("nan")}, {"step": 0, "x": {1: 0, "1": 0}}])
def test_a_record_that_could_not_be_read_is_not_written(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "journal.jsonl"
    with JournalWriter.create(path, HEADER) as writer:
        with pytest.raises(ValueError):
            writer.append(record)
        writer.append({"step": 0})
    assert read_journal(path).records == [{"step": 0}]


def test_an_existing_journal_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    content = _written(path, _records(1))
    with pytest.raises(AdapterError, match="resume that run"):
        JournalWriter.create(path, HEADER)
    assert path.read_bytes() == content


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"none\.jsonl: cannot be read: No such file"):
        read_journal(tmp_path / "none.jsonl")


def test_the_check_in_the_format_description_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _written(tmp_path / "journal.jsonl", _records(3))
    page = Path(__file__).parents[2] / "adapters" / "README.md"
    code = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})


@pytest.mark.parametrize("happens", ["moved", "removed", "replaced"])
def test_a_step_is_not_written_where_nobody_would_find_it(tmp_path: Path, happens: str) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    path.parent.mkdir()
    first, second = _records(2)
    with JournalWriter.create(path, HEADER) as writer:
        writer.append(first)
        if happens == "moved":
            path.parent.rename(tmp_path / "elsewhere")
        elif happens == "removed":
            path.unlink()
        else:
            path.rename(path.with_suffix(".old"))
            path.write_bytes(b"another")
        with pytest.raises(AgzoError, match=r"has been moved, removed or replaced .* after 1 steps"):
            writer.append(second)
