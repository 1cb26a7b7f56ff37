"""A JSON Lines file too large to be held: where each of its lines begins."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agzo_edge.errors import DataError
from agzo_edge.train.rows import MAX_ROW_BYTES, BrokenRow, RawRow, json_row, too_long
from agzo_edge.units import MIB

_CHUNK_BYTES = 16 * MIB
_LINE_END = ord("\n")


@dataclass(frozen=True)
class RowIndex:
    """The lines of a file, read one by one; the index takes 12 bytes for each."""

    path: Path
    starts: NDArray[np.int64]  # (lines,) offset in bytes
    sizes: NDArray[np.int32]  # (lines,) bytes, the line's end included; cut off at the largest int32
    sha256: str  # of the file

    def __len__(self) -> int:
        return len(self.starts)

    def place(self, index: int) -> str:
        """A line's name for a person: "notes.jsonl:12"."""
        return f"{self.path.name}:{index + 1}"

    def row(self, index: int) -> RawRow | BrokenRow | None:
        """The row on a line; none when it is blank. Raises DataError when the file cannot be read any more."""
        place, size = self.place(index), int(self.sizes[index])
        if size >= MAX_ROW_BYTES:
            return too_long(place)
        try:
            with self.path.open("rb") as file:
                file.seek(int(self.starts[index]))
                line = file.read(size)
        except OSError as error:
            raise DataError(f"{place}: cannot be read: {error}") from None
        text = line.decode("utf-8" if index else "utf-8-sig", errors="surrogateescape")
        return json_row(text, place) if text.strip() else None


def row_index(path: Path) -> RowIndex:
    """The index of a JSON Lines file, from one pass over its bytes. Raises DataError when it cannot be read."""
    digest = hashlib.sha256()
    ends: list[NDArray[np.int64]] = []
    n_bytes = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == _LINE_END) + (n_bytes + 1))
                n_bytes += len(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    edges = np.concatenate([np.zeros(1, np.int64), *ends])
    if edges[-1] != n_bytes:  # the last line has no end
        edges = np.append(edges, n_bytes)
    sizes = np.minimum(np.diff(edges), np.iinfo(np.int32).max).astype(np.int32)
    return RowIndex(path, edges[:-1], sizes, digest.hexdigest())
