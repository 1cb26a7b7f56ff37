"""A disk that fails at a chosen moment.

`FaultyDisk` stands between the package and the `os` functions through which files below one directory are
changed, and counts the calls. At the chosen one

    torn    the process gets SIGKILL, in a write after a part of its bytes; what was written before stays
    power   the machine goes out: what was not synced is lost, kept or torn, file by file and name by name
    full    this call and every later one that needs space fail with ENOSPC, a write after a part of its bytes

For `power` it keeps what POSIX promises: a file has the bytes of its last fsync or fdatasync, a directory the
names of its own last fsync. That is stricter than ext4, where syncing a new file keeps its name too.
"""

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

SECTOR_BYTES = 512  # what a disk writes whole
Fault = Literal["torn", "power", "full"]
CHANGES_NAMES = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir")
CALLS = (*CHANGES_NAMES, "open", "close", "write", "fsync", "fdatasync", "ftruncate")
REAL = {name: getattr(os, name) for name in CALLS}


@dataclass(eq=False)
class File:
    """A file's bytes at its last sync."""

    durable: bytes = b""


@dataclass(eq=False)
class Directory:
    """The names in a directory now, those at its last sync, and the changes since."""

    live: dict[str, Any] = field(default_factory=dict)
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[dict[str, Any]] = field(default_factory=list)

    def change(self, names: dict[str, Any]) -> None:
        """Names that change at once; None takes one away."""
        self.pending.append(names)
        _apply(names, self.live)

    def synced(self) -> None:
        """What is there now stays there."""
        self.durable, self.pending = dict(self.live), []


def _apply(change: dict[str, Any], names: dict[str, Any]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class FaultyDisk:
    """In a `with` block the disk below `root` fails at call number `at_call`, never without one."""

    def __init__(self, root: Path, fault: Fault, *, at_call: int | None, generator: random.Random) -> None:
        self.root = root.resolve()
        self.fault, self.at_call, self.random = fault, at_call, generator
        self.calls = 0
        self.tree = _scanned(self.root)
        self._open_nodes: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in REAL:
            wrapper = self._renaming(name) if name in CHANGES_NAMES else getattr(self, f"_{name}")
            setattr(os, name, wrapper)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, function in REAL.items():
            setattr(os, name, function)

    def _at_this_call(self, do: Callable[[], Any], note: Callable[[Any], None], part: Callable[[], object]) -> Any:
        """The answer of `do`, noted in the tree; at the chosen call, death before it (and `part` of it) or after."""
        number, self.calls = self.calls, self.calls + 1
        if self.fault == "full" and self.at_call is not None and number >= self.at_call:
            part()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        dies = number == self.at_call
        if dies and self.random.random() < 0.5:
            part()
            self._die()
        answer = do()
        note(answer)
        if dies:
            self._die()
        return answer

    def _die(self) -> None:
        if self.fault == "power":
            image = self._surviving(self.tree, self._live_bytes(self.tree, self.root))
            self.__exit__(None, None, None)
            for entry in self.root.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            _write_out(self.root, image)
        os.kill(os.getpid(), signal.SIGKILL)

    # The functions of `os`

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)

        def do() -> int:
            return REAL["open"](path, flags, mode, dir_fd=dir_fd)

        def note(descriptor: int) -> None:
            parent, node = self._parent(place), self._node(place)
            if node is None:
                node = File()
                parent.change({place.name: node})
            self._open_nodes[descriptor] = node

        if place is None:
            return do()
        if flags & (os.O_CREAT | os.O_TRUNC):
            return self._at_this_call(do, note, lambda: None)
        descriptor = do()
        note(descriptor)
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._open_nodes.pop(descriptor, None)
        REAL["close"](descriptor)

    def _write(self, descriptor: int, data: Any) -> int:
        if descriptor not in self._open_nodes:
            return REAL["write"](descriptor, data)

        def part() -> int:
            return REAL["write"](descriptor, bytes(data)[: self.random.randrange(len(data) + 1)])

        return self._at_this_call(lambda: REAL["write"](descriptor, data), _nothing, part)

    def _ftruncate(self, descriptor: int, length: int) -> None:
        if descriptor not in self._open_nodes or self.fault == "full":  # freeing space needs none
            return REAL["ftruncate"](descriptor, length)
        return self._at_this_call(lambda: REAL["ftruncate"](descriptor, length), _nothing, _none)

    def _fsync(self, descriptor: int) -> None:
        self._sync("fsync", descriptor)

    def _fdatasync(self, descriptor: int) -> None:
        self._sync("fdatasync", descriptor)

    def _sync(self, name: str, descriptor: int) -> None:
        node = self._open_nodes.get(descriptor)

        def note(_: None) -> None:
            if isinstance(node, Directory):
                node.synced()
            else:
                node.durable = Path(f"/proc/self/fd/{descriptor}").read_bytes()

        if node is None:
            REAL[name](descriptor)
        else:
            self._at_this_call(lambda: REAL[name](descriptor), note, _none)

    def _renaming(self, name: str) -> Callable[..., None]:
        """The function of this name for every call that makes, moves or removes a name."""

        def call(path: Any, *arguments: Any, **keywords: Any) -> None:
            place = self._place(path, keywords.get("dir_fd"))

            def do() -> None:
                REAL[name](path, *arguments, **keywords)

            def note(_: None) -> None:
                moved = self._node(place)
                change: dict[str, Any] = {place.name: Directory() if name == "mkdir" else None}
                if name in ("replace", "rename"):
                    target = self._place(arguments[0], None)
                    assert getattr(target, "parent", None) == place.parent, "a rename across directories"
                    change[target.name] = moved
                self._parent(place).change(change)

            frees = self.fault == "full" and name in ("unlink", "remove", "rmdir")
            if place is None or frees:
                do()
            else:
                self._at_this_call(do, note, _none)

        return call

    # The tree

    def _place(self, path: Any, dir_fd: int | None) -> Any:
        """The absolute path below the root; none when it lies elsewhere."""
        if isinstance(path, int):
            return None
        place = Path(os.fsdecode(path))
        if dir_fd is not None:
            place = Path(f"/proc/self/fd/{dir_fd}").readlink() / place
        place = place.absolute()
        return place if place.is_relative_to(self.root) else None

    def _node(self, place: Path) -> Any:
        node: Any = self.tree
        for part in place.relative_to(self.root).parts:
            node = node.live.get(part) if isinstance(node, Directory) else None
        return node

    def _parent(self, place: Path) -> Directory:
        return self.tree if place == self.root else self._node(place.parent)

    # Power loss

    def _live_bytes(self, directory: Directory, path: Path) -> dict[int, bytes]:
        """What every file holds now, by its node's id."""
        found: dict[int, bytes] = {}
        for name, node in directory.live.items():
            if isinstance(node, Directory):
                found |= self._live_bytes(node, path / name)
            else:
                found[id(node)] = (path / name).read_bytes()
        return found

    def _surviving(self, directory: Directory, live: dict[int, bytes]) -> dict[str, Any]:
        """A directory's content after the power came back: files as bytes, directories as dicts."""
        names = dict(directory.durable)
        how = self.random.choice(("none", "all", "first", "any"))
        first = self.random.randrange(len(directory.pending) + 1)
        for number, change in enumerate(directory.pending):
            kept = {"none": False, "all": True, "first": number < first, "any": self.random.random() < 0.5}[how]
            if kept:
                _apply(change, names)
        return {
            name: self._surviving(node, live)
            if isinstance(node, Directory)
            else self._torn(node.durable, live.get(id(node), node.durable))
            for name, node in names.items()
        }

    def _torn(self, durable: bytes, live: bytes) -> bytes:
        """What is left of a file: its synced bytes, its last ones, or sectors of both and an end in between."""
        if durable == live:
            return live
        how = self.random.choice(("durable", "live", "sectors", "sectors"))
        if how != "sectors":
            return durable if how == "durable" else live
        shorter, longer = sorted((len(durable), len(live)))
        length = self.random.choice((shorter, longer, self.random.randint(shorter, longer)))
        sides = [side[:length].ljust(length, b"\0") for side in (durable, live)]
        return b"".join(
            self.random.choice(sides)[start : start + SECTOR_BYTES] for start in range(0, length, SECTOR_BYTES)
        )


def _nothing(_: object) -> None: ...


def _none() -> None: ...


def _scanned(path: Path) -> Directory:
    """The directory as it is on the disk, all of it synced."""
    names = {entry.name: _scanned(entry) if entry.is_dir() else File(entry.read_bytes()) for entry in path.iterdir()}
    return Directory(dict(names), names)


def _write_out(path: Path, image: dict[str, Any]) -> None:
    """Leave `image` on the disk, with the real functions."""
    for name, content in image.items():
        if isinstance(content, bytes):
            with (path / name).open("wb") as stream:
                stream.write(content)
        else:
            REAL["mkdir"](path / name)
            _write_out(path / name, content)
