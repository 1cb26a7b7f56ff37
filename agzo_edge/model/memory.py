"""Memory as the machine sees it: what we use, the most that we used, what is free, and a hard limit on more."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from agzo_edge.budget.detect import available_host_bytes, total_host_bytes
from agzo_edge.budget.memory import MemoryPlan
from agzo_edge.errors import BudgetBrokenError, BudgetError
from agzo_edge.units import MIB, format_bytes

RETURNED_BYTES = MIB  # smaller blocks stay in the heap: measured, below it a step takes 5 to 10 % longer
KEPT_MATMULS = 32  # more than the shapes of a step; each takes 0.3 MiB on an AVX-512 CPU, measured
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # written there, VmHWM falls back to what is resident now: proc(5)
_ALLOCATION_FAILED = re.compile(
    r"can(?:no|')t allocate memory|not enough memory|out of memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE
)
_expected_outside: dict[torch.device, int] = {}  # bytes, for bytes_outside_torch


class PeakMeter:
    """Bytes that this process takes of a device's budget, and the most it took since `restart`.

    CUDA: torch's allocator and what lies outside it. CPU: anonymous memory, because weights may be mapped and
    resident pages of a file are not ours; between two readings the kernel's own high-water mark tells the peak,
    where it can be reset (Linux), else the readings are all there is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                _CLEAR_REFS.write_text(_RESET_PEAK)
        self.peak_bytes = used_bytes(self.device)

    def read(self) -> int:
        """Bytes in use now; the peak takes in all that were in use since the last reading."""
        used = used_bytes(self.device)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device) + bytes_outside_torch(self.device)
        else:
            peak = _anonymous_peak()
            with suppress(OSError):
                _CLEAR_REFS.write_text(_RESET_PEAK)
        self.peak_bytes = max(self.peak_bytes, used, peak)
        return used


def used_bytes(device: torch.device) -> int:
    """Bytes of the device's memory that this process has."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) + bytes_outside_torch(device)
    return anonymous_bytes()


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: RssAnon where the kernel tells it, else the resident set."""
    told = _status()
    return told["RssAnon"] if "RssAnon" in told else int(psutil.Process().memory_info().rss)


def _anonymous_peak() -> int:
    """The high-water mark of resident memory, less the files' part of it as it is now; 0 where none is told."""
    told = _status()
    return told.get("VmHWM", 0) - told.get("RssFile", 0) - told.get("RssShmem", 0)


def _status() -> dict[str, int]:
    """The amounts in /proc/self/status, in bytes by name; none on other systems."""
    if not _STATUS.exists():
        return {}
    found = re.findall(r"^(\w+):\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in found}


def bytes_outside_torch(device: torch.device) -> int:
    """Bytes of a GPU that this process has beside torch's allocator: context, cuBLAS, bitsandbytes.

    By NVML, which knows each process; where it does not (not installed, in some containers, on Windows) what
    `expect_outside_torch` was told.
    """
    used = _nvml_used(device)
    return _expected_outside.get(device, 0) if used == 0 else max(0, used - torch.cuda.memory_reserved(device))


def expect_outside_torch(device: torch.device, n_bytes: int) -> None:
    """Count with so many bytes outside torch's allocator wherever NVML does not tell: a plan's estimate."""
    _expected_outside[device] = n_bytes


def _nvml_used(device: torch.device) -> int:
    """Bytes of a GPU that this process has in all, by NVML; 0 where it does not tell."""
    found = _nvml(device)
    if found is None:
        return 0
    nvml, handle = found
    try:
        mine = [p for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except nvml.NVMLError:
        return 0
    return int(mine[0].usedGpuMemory or 0) if mine else 0


@cache
def _nvml(device: torch.device) -> tuple[Any, Any] | None:
    """The NVML library and its handle of the device; None where it is not installed or knows no such device."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except nvml.NVMLError:
        return None


def free_bytes(device: torch.device) -> int:
    """Bytes that nobody has."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_host_bytes()


def total_bytes(device: torch.device) -> int:
    """Bytes of the device's memory, whoever has them; of a container's host what it may use."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else total_host_bytes()


def load_context(device: torch.device) -> None:
    """Let a GPU's context and cuBLAS take their memory now, so that it is not taken for a model's."""
    if device.type == "cuda":
        square = torch.ones(32, 32, device=device)
        (square @ square).sum().item()


def give_back(device: torch.device) -> None:
    """Let the allocator return to the system what it holds and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give the heap's gaps back: what is smaller than RETURNED_BYTES stays there when it is freed.

    Between a small model's layers and its logits these were 10 to 15 MiB, for 1 to 3 % of a step (measured).
    """
    with suppress(OSError, AttributeError):  # glibc's alone; others do it by themselves
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def return_what_is_freed() -> None:
    """Let every tensor of a megabyte or more come from the system, and go back to it at once when it is freed.

    glibc would keep blocks of up to 32 MiB in its heap for later ones, where gaps stay: a process then holds what
    one phase needed while the next runs, and nobody can tell beforehand how much (docs/decisions/0010). Nor may
    oneDNN keep a thousand 16-bit matmuls ready (docs/decisions/0034).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_MATMULS))
    with suppress(OSError, AttributeError):  # glibc's alone
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, RETURNED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, RETURNED_BYTES)
        libc.mallopt(_M_ARENA_MAX, 1)  # a heap for each thread would keep what the loader's threads freed


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation has failed."""
    return isinstance(error, MemoryError) or _ALLOCATION_FAILED.search(str(error)) is not None


@contextmanager
def refused_as_budget(plan: MemoryPlan) -> Iterator[None]:
    """Inside, an allocation that fails is a BudgetError: the model of this plan is loaded, and nothing was learned."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise BudgetError(
            f"the model could not be loaded within {format_bytes(plan.limit_bytes)}, of which "
            f"{format_bytes(plan.device_bytes)} were planned: the machine gives less ({_first_line(error)}). Lower "
            "--vram-limit (without a GPU --ram-limit) to what is free, so that the plan keeps to it (--on-overflow "
            "stream), or close other programs"
        ) from None


def _first_line(error: Exception) -> str:
    """What an allocation's failure says of itself."""
    return str(error).strip().split("\n")[0] or "out of memory"


@contextmanager
def capped(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """Inside, an allocation that would pass `limit_bytes` fails, and comes out as BudgetBrokenError.

    CUDA: the cap of torch's allocator, at what the limit leaves beside everything outside it.
    The cap never exceeds the card's memory, since some drivers (Windows, WSL) spill into the host's.
    CPU: the kernel's limit on data growth (Linux; elsewhere only the measured peak tells).
    """
    with _allocator_cap(limit_bytes, device) if device.type == "cuda" else _data_cap(limit_bytes):
        try:
            yield
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if is_out_of_memory(error):
                raise BudgetBrokenError(_first_line(error)) from error
            raise


@contextmanager
def _allocator_cap(limit_bytes: int, device: torch.device) -> Iterator[None]:
    _, total_bytes = torch.cuda.mem_get_info(device)
    share = (limit_bytes - bytes_outside_torch(device)) / total_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def _data_cap(limit_bytes: int) -> Iterator[None]:
    told = _status()
    if sys.platform != "linux" or not {"VmData", "RssAnon"} <= told.keys():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    room = max(0, limit_bytes - told["RssAnon"])
    limits = [told["VmData"] + room, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))  # never above what was there
    try:
        yield
    finally:
        with suppress(ValueError):  # somebody has lowered the hard limit meanwhile, and the soft one with it
            resource.setrlimit(resource.RLIMIT_DATA, before)
