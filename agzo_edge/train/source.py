"""Where rows come from: a file, a directory with a file for each split, or a data set of the hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from agzo_edge.errors import DataError
from agzo_edge.train.rows import FILE_KINDS, BrokenRow, RawRow, file_kind, file_rows

Split = Literal["train", "validation", "test"]

_FILE_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}


def read_rows(source: str, *, split: Split) -> Iterator[RawRow | BrokenRow]:
    """The rows of a file, of a directory's file for `split`, or of a hub data set's `split`.

    Raises DataError when the source does not exist or cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _split_file(path, split)
    if path.exists():
        yield from file_rows(path)
    elif file_kind(path) in FILE_KINDS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(f"{source}: no such file or directory")
    else:
        yield from _hub_rows(source, split)


def _split_file(directory: Path, split: Split) -> Path:
    """The one file of a directory that holds `split`: train.jsonl, valid.csv.gz, ..."""
    names = _FILE_NAMES[split]
    wanted = " or ".join(f"{name}.*" for name in names)
    files = sorted(path for path in directory.iterdir() if file_kind(path) in FILE_KINDS)
    found = [path for path in files if path.name.split(".")[0].lower() in names]
    if not found:
        there = ", ".join(path.name for path in files[:5]) or "no data file"
        raise DataError(f"{directory}: no {wanted} in it ({there}): rename the file, or name it itself")
    if len(found) > 1:
        both = f"{found[0].name} and {found[1].name}"
        raise DataError(f"{directory}: {both} both match {wanted}: name one of them")
    return found[0]


def _hub_rows(name: str, split: Split) -> Iterator[RawRow]:
    import datasets  # takes seconds, and is needed for nothing else

    try:
        table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{name}: no such file or directory, and the {split} split of a data set of that name "
            f"cannot be had from the hub: {reason}"
        ) from None
    for number, fields in enumerate(table, start=1):
        yield RawRow(f"{name}:row {number}", fields)
