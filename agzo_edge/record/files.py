"""Files that are whole or not there: written aside, synced, renamed.

One process writes a directory at a time (`lock.RunLock`), so the name of the file aside is fixed, and what
a killed process left there is overwritten by the next write.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from agzo_edge.errors import AdapterError, AgzoError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PLATFORM_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Leave `data` at `path` in one instant; a crash, a full disk or a power cut leaves what was there.

    Raises AgzoError when it cannot be written.
    """
    with writing(path):
        write_aside(path, data)
        put_in_place(path)


def atomic_write_text(path: Path, text: str) -> None:
    """Leave `text` in UTF-8 at `path` in one instant, as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path` and in which every OSError becomes an AgzoError for a person."""
    try:
        yield
    except OSError as error:
        message = f"{path}: cannot be written: {error.strerror}; what was there before is intact"
        if error.errno in _NO_SPACE:
            message += f"; free space on the disk of {path.absolute().parent} and run again"
        raise AgzoError(message) from error


def aside(path: Path) -> Path:
    """Where the bytes of `path` wait until they are whole: the same directory, so that a rename is atomic."""
    return path.with_name(f".{path.name}.partial")


def write_aside(path: Path, data: bytes) -> None:
    """Write and sync `data` beside `path`, which stays as it is; a failure leaves nothing. Raises OSError."""
    try:
        descriptor = os.open(aside(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _PLATFORM_FLAGS, 0o666)
        try:
            write_all(descriptor, data)
            sync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        discard_aside(path)
        raise


def put_in_place(path: Path) -> None:
    """Give what was written aside its name, for good: the directory is synced too. Raises OSError."""
    try:
        aside(path).replace(path)
    except OSError:
        discard_aside(path)
        raise
    sync_directory(path.parent)


def discard_aside(path: Path) -> None:
    """Remove what was written beside `path`, if anything."""
    with contextlib.suppress(OSError):
        aside(path).unlink(missing_ok=True)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte of `data`: one system call, or more where the kernel takes a part of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync(descriptor: int) -> None:
    """Return when the file's bytes and length are on the disk itself."""
    try:
        from fcntl import F_FULLFSYNC, fcntl  # type: ignore[attr-defined, unused-ignore]  # macOS only
    except ImportError:
        # fdatasync leaves out the time stamps, and keeps the length: half the writes on ext4
        getattr(os, "fdatasync", os.fsync)(descriptor)
    else:
        fcntl(descriptor, F_FULLFSYNC)  # fsync on macOS stops at the drive's cache


def sync_directory(directory: Path) -> None:
    """Return when names made, changed or removed in `directory` are on the disk."""
    if os.name == "nt":  # a directory cannot be opened there, and a rename is journalled
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Leave a directory at `path`, and its name, and those of the new ones above it, on the disk. Raises OSError."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in (path, *missing):
        with contextlib.suppress(PermissionError):  # somebody else's directory, which we may enter and not read
            sync_directory(made.parent)


def inside(directory: Path, name: str) -> Path:
    """`directory / name`, for a name that was read from a file or given by another program.

    Raises AdapterError unless it stays below `directory`, symbolic links followed, on every system:
    so no drive letter, backslash, `..`, control character or absolute path.
    """
    parts = name.split("/")
    path = directory / name
    if (
        any(part in ("", ".", "..") for part in parts)
        or re.search(r'[\x00-\x1f\\:*?"<>|]', name)
        or not path.resolve().is_relative_to(directory.resolve())
    ):
        raise AdapterError(f"the file name {name!r} leads outside {directory}, or is no plain name: refused")
    return path
