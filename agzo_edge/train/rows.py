"""Raw rows from the files people have, each with its place: "notes.jsonl:12"; plain text as a whole.

A broken row does not stop the reading. It comes out as a `BrokenRow`, so that a person sees all the
faults of a file at once. A source that cannot be read at all raises DataError. Text is read as UTF-8
with or without a byte-order mark; bytes that are not UTF-8 survive as lone surrogates, which the check
of the fields refuses with the line.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from agzo_edge.errors import DataError
from agzo_edge.units import MIB, format_bytes

MAX_ROW_BYTES = 16 * MIB  # a longer line is no row: a file without line ends, or of another kind
_LISTS = ("messages", "conversations", "options")  # columns that a table's cell can only hold as JSON
_MESSAGES = ("prompt", "completion", "chosen", "rejected")  # those that may be text, or messages as JSON


@dataclass(frozen=True)
class RawRow:
    """One row as the source holds it."""

    place: str  # for a person: file and line, or the row's number where there are no lines
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """A file of plain text, which is yet to be taken apart into rows."""

    name: str
    text: str


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be used, and why."""

    place: str
    fault: str

    def __str__(self) -> str:
        return f"{self.place}: {self.fault}"


def file_rows(path: Path) -> Iterator[RawRow | BrokenRow | Document]:
    """The rows of one file, or its plain text. Raises DataError when it cannot be read, or is of a kind that is not."""
    reader = FILE_KINDS.get(file_kind(path))
    if reader is None:
        known = ", ".join(FILE_KINDS)
        raise DataError(f"{path}: files of this kind are not read: use one of {known} (text also .gz)")
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def file_kind(path: Path) -> str:
    """The suffix that says how a file is read, without .gz: ".jsonl" for notes.jsonl.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _text(path: Path, *, newline: str) -> TextIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _json_lines(path: Path) -> Iterator[RawRow | BrokenRow]:
    with _text(path, newline="\n") as lines:
        for number, line in enumerate(_lines(lines), start=1):
            place = f"{path.name}:{number}"
            if line is None:
                yield too_long(place)
            elif line.strip():
                yield json_row(line, place)


def _lines(file: TextIO) -> Iterator[str | None]:
    """The lines of a file; none in place of one that is too long, which is never held as a whole."""
    while line := file.readline(MAX_ROW_BYTES):
        too_long = len(line) == MAX_ROW_BYTES
        while len(line) == MAX_ROW_BYTES and not line.endswith("\n"):
            line = file.readline(MAX_ROW_BYTES)
        yield None if too_long else line


def too_long(place: str) -> BrokenRow:
    """What becomes of a line that is longer than a row may be."""
    return BrokenRow(place, f"the line is longer than {format_bytes(MAX_ROW_BYTES)}: is this a file of lines?")


def json_row(line: str, place: str) -> RawRow | BrokenRow:
    """The row on a line of JSON Lines."""
    try:
        value = json.loads(line.rstrip())  # or a fault at the end would be in column 1 of the next
    except json.JSONDecodeError as error:
        return BrokenRow(place, _json_fault(error))
    except (ValueError, RecursionError) as error:  # a number of 10,000 digits, brackets without end
        return BrokenRow(place, f"broken JSON: {error}")
    return _object_row(value, place)


def _json_fault(error: json.JSONDecodeError) -> str:
    if "\0" in error.doc:
        return "broken JSON: it holds NUL bytes, as UTF-16 does: save the file as UTF-8"
    return f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}"  # "Invalid control character at"


def _json_document(path: Path) -> Iterator[RawRow | BrokenRow]:
    with _text(path, newline="\n") as file:
        text = file.read()
    try:
        document = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{"):  # JSON Lines under a .json name, as on many pages of the hub
            yield from _json_lines(path)
            return
        place = f"{path.name}:{error.lineno}"
        raise DataError(f"{place}: {_json_fault(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: broken JSON: {error}") from None
    values = document if isinstance(document, list) else [document]
    for number, value in enumerate(values, start=1):
        yield _object_row(value, f"{path.name}:row {number}")


def _object_row(value: object, place: str) -> RawRow | BrokenRow:
    if isinstance(value, dict):
        return RawRow(place, value)
    return BrokenRow(place, f'holds {type_name(value)}; a row is an object: {{"text": ...}}')


def _plain_text(path: Path) -> Iterator[Document]:
    with _text(path, newline="") as file:
        yield Document(path.name, file.read().replace("\r\n", "\n"))


def _csv(path: Path) -> Iterator[RawRow | BrokenRow]:
    with _text(path, newline="") as lines:
        names = next((line for line in iter(lambda: lines.readline(MAX_ROW_BYTES), "") if line.strip()), "")
    # Where a comma is in the numbers, spreadsheets put semicolons between the cells.
    delimiter = ";" if _n_cells(names, ";") > _n_cells(names, ",") else ","
    return _table_rows(path, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL)


def _n_cells(line: str, delimiter: str) -> int:
    """The cells of a table's line, if they are apart by this; 0 where they cannot be."""
    try:
        return len(next(csv.reader([line], delimiter=delimiter, strict=True), []))
    except csv.Error:
        return 0


def _tsv(path: Path) -> Iterator[RawRow | BrokenRow]:
    # No quoting, as IANA defines text/tab-separated-values: the quotes in a sentence are the sentence's.
    return _table_rows(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table_rows(path: Path, *, delimiter: str, quoting: Literal[0, 3]) -> Iterator[RawRow | BrokenRow]:
    with _text(path, newline="") as lines:
        csv.field_size_limit(MAX_ROW_BYTES)
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        columns: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                place, line = f"{path.name}:{line}", reader.line_num + 1  # a quoted cell may span lines
                if not cells:
                    continue
                if columns is None:
                    columns = _columns(cells, place)
                else:
                    yield _table_row(columns, cells, place)
        except csv.Error as error:  # what follows an open quote cannot be told into rows
            yield BrokenRow(f"{path.name}:{line}", f"not a table's row; nothing after it was read: {error}")


def _columns(cells: list[str], place: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    for column in columns:
        if column and columns.count(column) > 1:  # pandas leaves its index without a name
            raise DataError(f"{place}: column {column!r} is named twice; the first line names the columns")
    return columns


def _table_row(columns: list[str], cells: list[str], place: str) -> RawRow | BrokenRow:
    if len(cells) != len(columns):
        return BrokenRow(place, f"{len(cells)} cells, but the first line names {len(columns)} columns")
    return RawRow(place, {column: _cell(column, cell) for column, cell in zip(columns, cells, strict=True)})


def _cell(column: str, cell: str) -> Any:
    if column not in _LISTS + _MESSAGES or not cell.lstrip().startswith("["):
        return cell
    try:
        values = json.loads(cell)
    except (ValueError, RecursionError):
        return cell  # of a list the check of the fields says that it is none
    are_messages = all(isinstance(value, dict) and "role" in value for value in values)
    return values if column in _LISTS or (values and are_messages) else cell


def _parquet(path: Path) -> Iterator[RawRow | BrokenRow]:
    import pyarrow.parquet  # comes with datasets, which a machine that only runs JSONL can do without

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for fields in batch.to_pylist():
                number += 1
                yield RawRow(f"{path.name}:row {number}", fields)
    except (
        pyarrow.ArrowException,
        OSError,
        OverflowError,
        ValueError,
    ) as error:  # pages, dates, text that is not UTF-8
        raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}") from None


def type_name(value: object) -> str:
    """What a JSON value is, for a person: "a list", "null"."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


PLAIN_KINDS = (".txt", ".md")
FILE_KINDS: Mapping[str, Callable[[Path], Iterator[RawRow | BrokenRow | Document]]] = {
    ".jsonl": _json_lines,
    ".json": _json_document,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    **dict.fromkeys(PLAIN_KINDS, _plain_text),
}
