"""`journal.jsonl`: a header, then one line for each step, on the disk before the step counts.

A line is a JSON object in ASCII with the field "crc" last: the CRC-32 (zlib's, 8 lower-case hex digits) of
the object's bytes without that field, from its "{" to its "}". So for  {"step":7,"crc":"47430a17"}  the
CRC-32 is that of  {"step":7}  and every tool that reads JSON lines reads a journal. CRC-32 finds every
change of up to four neighbouring bytes, and the torn end that a power cut leaves.

Floats are written by their shortest decimal that reads back as the same float64, and so float32 values come
back bit for bit. adapters/README.md describes the format for people.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from agzo_edge.errors import AdapterError, AgzoError
from agzo_edge.record.files import atomic_write_bytes, sync, write_all, writing
from agzo_edge.record.strict_json import strict_object
from agzo_edge.units import MIB

FORMAT = "agzo-edge journal"
FORMAT_VERSION = 2
MAX_LINE_BYTES = 64 * MIB  # a step of 10,000 examples takes half a MiB
_RESERVED = ("format", "format_version", "first_step", "crc")
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})"}\n')
_CHECKSUM_BYTES = len(b',"crc":"00000000"}\n')


@dataclass(frozen=True)
class Journal:
    """What a journal holds."""

    header: dict[str, Any]  # as it was given to `JournalWriter.create`
    records: list[dict[str, Any]]  # one for each step, in order
    torn_bytes: int  # length of the unfinished line at the end; 0 after a clean stop
    sound_bytes: int  # length of everything before it

    @property
    def next_step(self) -> int:
        """The number of the first step that is not in the journal."""
        return len(self.records)


class JournalWriter:
    """An open journal to which steps are appended; use it in a `with` block."""

    def __init__(self, path: Path, *, next_step: int) -> None:
        """Open an existing, sound journal; `create` and `resume` see to that."""
        self.path = path
        self.next_step = next_step
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
            self._n_bytes = os.fstat(self._descriptor).st_size
        self._is_open = True

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """A new journal of `header` alone, whole on the disk. Raises AdapterError if there is one already."""
        assert not header.keys() & set(_RESERVED), "a header's field has a reserved name"
        if path.exists():
            raise AdapterError(f"{path} exists: resume that run, or choose another --output-dir")
        about = {"format": FORMAT, "format_version": FORMAT_VERSION, "first_step": 0}
        atomic_write_bytes(path, _line(about | dict(header)))
        return cls(path, next_step=0)

    @classmethod
    def resume(cls, path: Path) -> Self:
        """The journal of an interrupted run, its torn end cut off. Raises AdapterError if it is damaged."""
        journal = read_journal(path)
        if journal.torn_bytes:
            with writing(path):
                _cut(path, journal.sound_bytes)
        return cls(path, next_step=journal.next_step)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the record of the next step; on return it is on the disk.

        On failure the line is taken back and the journal closed: the steps before it stay readable.
        Raises AgzoError for a full disk and for a journal that is no longer in its place, ValueError for a number that
        JSON does not have.
        """
        assert record.get("step") == self.next_step, f"step {record.get('step')} after {self.next_step - 1}"
        assert "crc" not in record, "the checksum is the journal's own"
        if not self._is_open:
            raise AgzoError(f"{self.path}: the journal is closed; nothing can be added")
        line = _line(record)
        self._require_in_place()
        with writing(self.path):
            try:
                write_all(self._descriptor, line)
                sync(self._descriptor)
            except BaseException:
                self._take_back()
                raise
        self._n_bytes += len(line)
        self.next_step += 1

    def _require_in_place(self) -> None:
        """Raise AgzoError where the run's directory was moved or removed while it ran: nobody would find the step."""
        try:
            is_in_place = os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            is_in_place = False
        if not is_in_place:
            raise AgzoError(
                f"{self.path}: has been moved, removed or replaced while the run wrote to it, after {self.next_step} "
                "steps: put its directory back and go on with --resume-from-checkpoint"
            )

    def close(self) -> None:
        """Close the file; every appended step is already on the disk."""
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)

    def _take_back(self) -> None:
        """Cut off what the failed append wrote; a torn end that stays is harmless, `resume` cuts it off."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self._n_bytes)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut(path: Path, n_bytes: int) -> None:
    """Shorten the file, on the disk itself. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
    try:
        os.ftruncate(descriptor, n_bytes)
        sync(descriptor)
    finally:
        os.close(descriptor)


def read_journal(path: Path) -> Journal:
    """The journal at `path`. A torn last line is left out and counted.

    Raises AdapterError, naming the line, for anything else that is wrong: a damaged line before the last,
    a line over MAX_LINE_BYTES, steps that do not follow each other, or JSON that its standard forbids.
    """
    try:
        with path.open("rb") as stream:
            return _journal(stream, path)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from None


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of the journal at `path` and nothing else of it; None where it is damaged or of another version."""
    with path.open("rb") as stream:
        line = stream.readline(MAX_LINE_BYTES + 1)
    try:
        fields = _fields(line, str(path))
        return None if fields is None else _checked_header(fields, str(path))
    except AdapterError:
        return None


def _journal(stream: BinaryIO, path: Path) -> Journal:
    header: dict[str, Any] | None = None
    records: list[dict[str, Any]] = []
    sound_bytes = torn_bytes = 0
    for where, line in _numbered_lines(stream, path):
        if torn_bytes:
            raise AdapterError(f"{where} follows a damaged line: restore the journal from a copy")
        fields = _fields(line, where)
        if fields is None:
            torn_bytes = len(line)
            continue
        sound_bytes += len(line)
        if header is None:
            header = _checked_header(fields, where)
        else:
            _check_step(fields, where, expected=len(records))
            records.append(fields)
    if header is None:
        raise AdapterError(f"{path}: line 1 is no sound header: there is no run to resume from")
    return Journal(header, records, torn_bytes, sound_bytes)


def _numbered_lines(stream: BinaryIO, path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line with its newline, and its place for a message."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{path}: line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise AdapterError(f"{where} is longer than {MAX_LINE_BYTES // MIB} MiB: this is no journal")
        yield where, line


def _line(fields: Mapping[str, Any]) -> bytes:
    """`fields` as one line with its checksum, such that `_fields` gives them back."""
    body = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii")
    line = body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line of {len(line)} bytes is longer than a journal's longest, {MAX_LINE_BYTES}")
    strict_object(line)  # what a reader would refuse, keys 1 and "1" say, must not get into the file
    return line


def _fields(line: bytes, where: str) -> dict[str, Any] | None:
    """The fields of a line without its checksum; none when the line is torn or damaged."""
    checksum = _CHECKSUM.fullmatch(line[-_CHECKSUM_BYTES:])
    if checksum is None or zlib.crc32(line[:-_CHECKSUM_BYTES] + b"}") != int(checksum[1], 16):
        return None
    try:
        fields = strict_object(line)
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from None
    del fields["crc"]
    return fields


def _checked_header(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The header as its writer gave it."""
    kind, version, first_step = (fields.pop(name, None) for name in _RESERVED[:3])
    if kind != FORMAT or version != FORMAT_VERSION:
        raise AdapterError(
            f"{where}: format {kind!r} version {version!r}; this agzo-edge reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    if type(first_step) is not int or first_step != 0:
        raise AdapterError(f"{where}: first_step is {first_step!r}, and a run begins at 0")
    return fields


def _check_step(fields: Mapping[str, Any], where: str, *, expected: int) -> None:
    step = fields.get("step")
    if type(step) is not int or step != expected:
        raise AdapterError(f"{where}: step is {step!r}, and {expected} was due")
