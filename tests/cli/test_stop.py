import os
import signal
from collections.abc import Iterator

import pytest

from agzo_edge.cli.stop import Stopped, handled_signals, stoppable


def test_a_signal_stops_at_once_when_nothing_is_deferred() -> None:
    with pytest.raises(Stopped) as stopped, handled_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 143


def test_a_deferred_signal_lets_the_item_under_way_be_used() -> None:
    used: list[float] = []

    def items() -> Iterator[float]:
        yield 1.5
        yield 1  # from here on stops are deferred
        os.kill(os.getpid(), signal.SIGINT)
        yield 2
        yield 3

    with handled_signals() as stop:
        stop.remedy = "go on"
        with pytest.raises(Stopped, match="SIGINT: go on") as stopped:
            used.extend(stoppable(items(), stop, defer_from=int))
    assert used == [1.5, 1, 2]
    assert stopped.value.exit_code == 130
