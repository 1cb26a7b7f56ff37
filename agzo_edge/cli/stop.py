"""Ctrl-C and SIGTERM: a clean stop between two steps, and at once when there is nothing to lose."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the program to end; `exit_code` is 128 and its number."""

    def __init__(self, number: int, *, remedy: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" + (remedy and f": {remedy}"))
        self.exit_code = 128 + number


class StopSignals:
    """Turns the signals into Stopped: at once, or, while `deferred`, when `check` is called.

    A second signal is not deferred: the system's own handling is back by then.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.remedy = ""  # how to go on after a deferred stop
        self._received: int | None = None

    def check(self) -> None:
        """Raise Stopped when a signal came while it was deferred."""
        if self._received is not None:
            raise Stopped(self._received, remedy=self.remedy)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The handler of the signals."""
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self._received = number
        if not self.deferred:
            raise Stopped(number)


@contextmanager
def handled_signals() -> Iterator[StopSignals]:
    """The signals' handling while the block runs; what was before comes back after it."""
    stop = StopSignals()
    before = {number: signal.signal(number, stop.receive) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt for whoever can go on after it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stoppable(items: Iterable[T], stop: StopSignals, *, defer_from: type) -> Iterator[T]:
    """The items; from the first of type `defer_from` on, a signal waits until the item at hand was used."""
    try:
        for item in items:
            stop.deferred = stop.deferred or isinstance(item, defer_from)
            yield item
            stop.check()
    finally:
        stop.deferred = False
