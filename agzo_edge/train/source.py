"""Where rows come from: a file, a directory with a file for each split or of notes, or a data set of the hub."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from agzo_edge.errors import DataError
from agzo_edge.train.rows import FILE_KINDS, PLAIN_KINDS, BrokenRow, Document, RawRow, file_kind, file_rows

Split = Literal["train", "validation", "test"]

_FILE_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
_PART = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")  # as the hub numbers a file's parts
_HELD_OUT = re.compile(rf"({'|'.join(_FILE_NAMES['validation'] + _FILE_NAMES['test'])})(?![a-z])", re.IGNORECASE)


def read_rows(source: str, *, split: Split) -> Iterator[RawRow | BrokenRow | Document]:
    """The rows of a file, of a directory's file for `split` or of its notes, or of a hub data set's `split`.

    Raises DataError when the source does not exist or cannot be read.
    """
    require_place(source)
    path = Path(source)
    if path.exists():
        for file in source_files(path, split=split):
            yield from file_rows(file)
    else:
        yield from _hub_rows(source, split)


def require_place(source: str) -> None:
    """Raise DataError for what names a file or directory, and there is none; a name of the hub may be anything."""
    path = Path(source)
    is_path = file_kind(path) in FILE_KINDS or source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not path.exists():
        raise DataError(f"{source}: no such file or directory")


def unused_validation(source: str) -> Path | None:
    """The held-out rows that lie beside a directory's training rows, for whoever has not named them."""
    path = Path(source)
    files = _files_in(path) if path.is_dir() else []
    if not any(_is_of(file, _FILE_NAMES["train"]) for file in files):
        return None
    return next((file for file in files if _is_of(file, _FILE_NAMES["validation"])), None)


def large_file(source: str, *, split: Split, at_least: int) -> Path | None:
    """The one JSON Lines file that a source is, when it has that many bytes and is not gzipped; else none."""
    path = Path(source)
    files = source_files(path, split=split) if path.exists() else []
    if len(files) == 1 and files[0].suffix.lower() == ".jsonl" and files[0].stat().st_size >= at_least:
        return files[0]
    return None


def source_files(path: Path, *, split: Split) -> list[Path]:
    """The files to read: the path itself, a directory's file for `split`, or all notes of a directory of notes.

    A file may be in numbered parts, and those of a data set from the hub in the folder `data`.
    """
    if not path.is_dir():
        return [path]
    try:
        files = _files_in(path)
        if split == "train" and not _has_splits(files):  # only then is all that lies below looked at
            notes = [file for file in _data_files(path.rglob("*")) if not _is_hidden(file.relative_to(path))]
            if notes and all(file_kind(note) in PLAIN_KINDS for note in notes):
                return notes
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return _split_files(path, files, split)


def _files_in(directory: Path) -> list[Path]:
    """The data files of a directory, or of its folder `data` where those are named as splits and its own are not."""
    files = _data_files(directory.iterdir())
    inner = _data_files((directory / "data").iterdir()) if (directory / "data").is_dir() else []
    return inner if _has_splits(inner) and not _has_splits(files) else files


def _data_files(paths: Iterator[Path]) -> list[Path]:
    """Those of the paths that are files of data, in order."""
    return sorted(path for path in paths if file_kind(path) in FILE_KINDS and path.is_file())


def _is_hidden(path: Path) -> bool:
    """Whether any part of the path is: such files belong to an editor, or to git."""
    return any(part.startswith(".") for part in path.parts)


def _has_splits(files: Sequence[Path]) -> bool:
    """Whether files are named as splits; a note may be called train.md among others."""
    of_split = [file for file in files if any(_is_of(file, names) for names in _FILE_NAMES.values())]
    return len(of_split) == len(files) > 0 or any(file_kind(file) != ".md" for file in of_split)


def _split_files(directory: Path, files: Sequence[Path], split: Split) -> list[Path]:
    """The file of a directory that holds `split`, or its parts: train.jsonl, train-00000-of-00002.parquet, ..."""
    names = _FILE_NAMES[split]
    found = [file for file in files if _is_of(file, names)]
    if split == "test" and not found:  # held out as well
        names = (*names, *_FILE_NAMES["validation"])
        found = [file for file in files if _is_of(file, names)]
    if split == "train" and not found and _are_parts(files) and not _HELD_OUT.match(files[0].name):
        return list(files)
    wanted = " or ".join(f"{name}.*" for name in names)
    if not found:
        tables = [file for file in files if file_kind(file) not in PLAIN_KINDS]  # or it would be a folder of notes
        there = ", ".join(path.name for path in (tables or files)[:5]) or "no data file"
        raise DataError(f"{directory}: no {wanted} in it ({there}): rename the file, or name it itself")
    if len(found) > 1 and not _are_parts(found):
        both = f"{found[0].name} and {found[1].name}"
        raise DataError(f"{directory}: {both} both match {wanted}: name one of them")
    return found


def _are_parts(files: Sequence[Path]) -> bool:
    """Whether the files are named alike but for a number, and are tables."""
    are_tables = all(file_kind(file) not in PLAIN_KINDS for file in files)
    is_numbered = any(re.search(r"\d", file.name) for file in files)
    return are_tables and is_numbered and len({re.sub(r"\d+", "0", file.name) for file in files}) == 1


def _is_of(file: Path, names: Sequence[str]) -> bool:
    """Whether a file is named as one of the splits, or as a part of it."""
    stem = file.name.split(".")[0].lower()
    return _PART.sub("", stem) in names


def _hub_rows(name: str, split: Split) -> Iterator[RawRow]:
    import datasets  # takes seconds, and is needed for nothing else
    from datasets.exceptions import DatasetsError

    try:
        table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{name}: no such file or directory, and the {split} split of a data set of that name "
            f"cannot be had from the hub: {reason}"
        ) from None
    for number, fields in enumerate(table, start=1):
        yield RawRow(f"{name}:row {number}", fields)
