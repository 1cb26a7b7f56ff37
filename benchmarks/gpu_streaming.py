"""Layers that wait in the host's memory: what a step costs then, and a model that no small card could hold."""

from functools import partial

import torch
from gpu_measure import Row, Rows, attempted, in_turns, peak_of, ratio, timing
from gpu_models import Setting, facts_of_shape
from gpu_steps import batches, planned_bytes, subject_of

from agzo_edge.budget.detect import available_host_bytes
from agzo_edge.model.stream import pinned_bytes
from agzo_edge.units import MIB, format_bytes

LARGE = "llama-3.1-70b"
COPIED_BYTES = 256 * MIB
HOST_SHARE = 2.2  # of the stored weights: they are there once more while blocks are put together


def streaming(setting: Setting) -> Rows:
    """Steps with the layers on the device and on the host, beside the time that copying them alone would take."""
    cases = (("tiny", 2, 16),) if setting.small else (("llama-3.1-8b", 1, 2048), ("llama-3.1-8b", 4, 2048))
    copy_rate = _copy_bytes_per_s(setting) if setting.on_gpu else None
    for shape, examples, tokens in cases:
        for offload in ("none", "layers"):
            yield _measured_as(setting, shape, (examples, tokens), offload=offload, copy_rate=copy_rate)
    if setting.on_gpu:
        yield _measured_as(setting, LARGE, (4, 2048), offload="layers", copy_rate=copy_rate)
    else:
        yield {"model": LARGE, "not_run": "on a CPU layers wait in a file, and nothing is streamed"}


def _measured_as(setting: Setting, shape: str, size: tuple[int, int], *, offload: str, copy_rate: float | None) -> Row:
    about = {"model": shape, "examples": size[0], "tokens_of_each": size[1], "offload": offload}
    stored_bytes = sum(out * inp for out, inp in facts_of_shape(shape).linears.values()) * 9 // 16  # 4.5 bit each
    if offload == "layers" and HOST_SHARE * stored_bytes > (free_bytes := available_host_bytes()):
        needed = format_bytes(round(HOST_SHARE * stored_bytes))
        return about | {"not_run": f"building it needs {needed} of the host, and {format_bytes(free_bytes)} are free"}
    floor = {"copy_alone_ms": 1e3 * stored_bytes / copy_rate} if copy_rate and offload == "layers" else {}
    return attempted(setting, about, partial(_step, setting, shape, size, offload)) | floor


def _step(setting: Setting, shape: str, size: tuple[int, int], offload: str) -> Row:
    subject = subject_of(setting, shape, offload=offload)
    batch, twice = batches(shape, *size)
    subject.step(batch, 0)
    runs = subject.runs(batch, twice)
    times = in_turns(setting, runs, repetitions=1 if setting.small else 3)
    return timing(times["step"]) | {
        "over_plain": ratio(times["step"], times["plain forward of 2B rows"]),
        "peak_bytes": peak_of(setting, runs["step with refresh"]),
        "planned_bytes": planned_bytes(setting, shape, size, offload=offload),
    }


def _copy_bytes_per_s(setting: Setting) -> float:
    """The rate of copies from pinned memory, nothing beside them."""
    source = pinned_bytes(COPIED_BYTES)
    target = torch.empty_like(source, device=setting.device)
    times = in_turns(setting, {"copy": lambda: target.copy_(source, non_blocking=True)}, repetitions=5)["copy"]
    return COPIED_BYTES / min(times)
