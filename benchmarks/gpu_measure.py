"""Seconds and bytes of something that runs on a device, and what becomes of a measurement that cannot be made."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from gpu_models import Setting

from agzo_edge.errors import AgzoError
from agzo_edge.model.memory import PeakMeter

Row = dict[str, Any]
Rows = Iterator[Row]
Section = Callable[[Setting], Rows]
Run = Callable[[], object]


def sync(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(setting: Setting, runs: Mapping[str, Run], *, repetitions: int) -> dict[str, list[float]]:
    """The seconds of several things that take turns, so that a busy or hot machine slows all of them.

    By the clock, with the device's work; one round before is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            sync(setting.device)
            start_s = perf_counter()
            run()
            sync(setting.device)
            if repetition > 0:
                times[name].append(perf_counter() - start_s)
    return times


def timing(times: Sequence[float]) -> Row:
    """Median and extremes in milliseconds."""
    return {"ms": 1e3 * statistics.median(times), "least_ms": 1e3 * min(times), "most_ms": 1e3 * max(times)}


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(one / other for one, other in zip(times, reference, strict=True))


def peak_of(setting: Setting, run: Run) -> int:
    """The most bytes of the device that this process had during one call; on CUDA with context and libraries."""
    setting.free()
    meter = PeakMeter(setting.device)
    run()
    sync(setting.device)
    meter.read()
    return meter.peak_bytes


def attempted(setting: Setting, about: Row, measure: Callable[[], Row]) -> Row:
    """`about` with what `measure` gives; or why there is nothing: the time is over, or the memory is too small.

    Every other error is a mistake of ours, and comes out.
    """
    setting.free()
    try:
        if setting.has_time:
            return about | measure()
        return about | {"not_run": "the time for the whole benchmark was over"}
    except (torch.OutOfMemoryError, AgzoError) as error:
        return about | {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        setting.free()
