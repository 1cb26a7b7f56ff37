"""A directory that is whole or not there: filled under another name, synced, renamed."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from agzo_edge.errors import ConfigError
from agzo_edge.record.files import sync, sync_directory, writing


def refuse_occupied(output: Path) -> None:
    """Raise ConfigError unless `output` is absent or an empty directory."""
    if output.is_dir():
        if (first := next(output.iterdir(), None)) is not None:
            raise ConfigError(f"{output}: is not empty ({first.name} is in it): name a new directory")
    elif output.exists() or output.is_symlink():
        raise ConfigError(f"{output}: is a file: name a new directory")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `output` when the block ends well and disappears when it does not.

    Raises ConfigError when `output` is occupied, AgzoError when the disk refuses.
    """
    refuse_occupied(output)
    target = output.resolve()
    # one name for all attempts: what a killed export left is found and removed by the next one
    partial = target.with_name(f".{target.name}.partial")
    with writing(output):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            _sync_tree(partial)
            if target.exists():
                target.rmdir()  # Windows renames onto no directory, not even an empty one
            partial.rename(target)
            sync_directory(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    """Return when every file below `directory` and its name are on the disk."""
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("r+b") as stream:
                sync(stream.fileno())
    sync_directory(directory)
