"""One process in a run directory at a time."""

import contextlib
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from agzo_edge.errors import AdapterError
from agzo_edge.record.files import make_directory, writing

LOCK_NAME = "run.lock"


class RunLock:
    """Holds `directory` for this process while the block runs; a second process gets an AdapterError.

    The lock is the operating system's and dies with its process: after a crash or a SIGKILL the file
    `run.lock` may stay behind, and locks nobody out.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_NAME
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        with writing(self.path):
            make_directory(self.path.parent)
            while (descriptor := self._locked_descriptor()) is None:
                pass  # the holder has just removed the file we opened: open the next one
            self._descriptor = descriptor
            try:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
            except BaseException:  # a full disk: who waits for space and tries again must find it free
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        assert self._descriptor is not None, "left without having been entered"
        with contextlib.suppress(OSError):  # Windows keeps an open file; unlocked it does no harm
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _locked_descriptor(self) -> int | None:
        """The open and locked file; none when its name was removed between the two. Raises AdapterError."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(descriptor):
                raise AdapterError(self._busy(descriptor))
            if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _busy(self, descriptor: int) -> str:
        """The message for the second process."""
        holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
        who = f"the process with pid {holder}" if holder.isdigit() else "another process"
        remedy = "wait for it to end, stop it, or choose another --output-dir"
        return f"{self.path.parent} is in use by {who}: {remedy}"


if sys.platform == "win32":
    import msvcrt

    _FAR_BYTE = 1 << 30  # Windows keeps others from reading a locked byte, and the pid is to be read

    def _try_lock(descriptor: int) -> bool:
        """Whether this process holds the file now."""
        os.lseek(descriptor, _FAR_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        """Whether this process holds the file now."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
