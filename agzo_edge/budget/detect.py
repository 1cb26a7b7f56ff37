"""A profile of this machine, from what the driver, psutil and the kernel say; torch is not needed."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import psutil

from agzo_edge.budget.gpu import Gpu, board_name, hides_gpus, visible_gpu
from agzo_edge.budget.profile import Profile, load_profile, profile_names
from agzo_edge.units import GIB, MIB

CPU_SHARE = 0.8  # of what is available now: the rest absorbs what other programs take while we run
CONTEXT_ESTIMATE_BYTES = 500 * MIB  # a GPU that no profile knows: the largest estimate of the cards with 24 GB or less
GPU_RESERVE_SHARE = 0.02  # allocations of other programs come and go while we run
SMALL_HOST_BYTES = 10 * GIB  # below it the shipped settings for 8 GB hold
SAME_MEMORY = 0.1  # cards of one name differ by memory (RTX 3060: 8 and 12 GB); NVML rounds a little
UNLIMITED_BYTES = 2**60  # cgroup v1 writes "no limit" as a number near 2**63


def machine_profile(name_or_path: str) -> Profile:
    """The profile that `--profile` means: `auto` is this machine, anything else a name or a file."""
    return detected_profile() if name_or_path == "auto" else load_profile(name_or_path)


def detected_profile() -> Profile:
    """This machine: its first visible GPU, or its CPU; speeds from a shipped profile of the same card or board."""
    if hides_gpus():
        return cpu_profile()
    if (gpu := visible_gpu()) is not None:
        return gpu_profile(gpu, host_bytes=usable_host_bytes())
    board = known_board(board_name())
    return cpu_profile() if board is None else board_profile(board)


def cpu_profile() -> Profile:
    """The host alone, limited to a share of the memory that is available now."""
    total_bytes = total_host_bytes()
    shipped = load_profile("cpu" if total_bytes > SMALL_HOST_BYTES else "cpu-8gb")
    budget_bytes = max(usable_host_bytes(), shipped.context_overhead + MIB)
    memory_bytes = max(total_bytes, budget_bytes + MIB)
    return Profile(
        name="auto (cpu)",
        description=f"this machine: {os.cpu_count()} CPU threads, no CUDA device found",
        kind="cpu",
        memory=memory_bytes,
        reserve=memory_bytes - budget_bytes,
        context_overhead=shipped.context_overhead,
        settings=shipped.settings,
    )


def gpu_profile(gpu: Gpu, *, host_bytes: int) -> Profile:
    """The profile of `gpu`, with what is in use on it now left to those who use it."""
    known = known_card(gpu)
    taken_bytes = gpu.memory_bytes - gpu.free_bytes + round(GPU_RESERVE_SHARE * gpu.memory_bytes)
    overhead_bytes = known.context_overhead if known else CONTEXT_ESTIMATE_BYTES
    return Profile(
        name=f"auto ({known.name if known else gpu.name})",
        description=f"this machine: {gpu.name}",
        kind="cuda",
        device_names=(gpu.name,),
        memory=gpu.memory_bytes,
        reserve=min(taken_bytes, gpu.memory_bytes - overhead_bytes - MIB),
        context_overhead=overhead_bytes,
        host_memory=host_bytes,
        memory_bandwidth_gb_s=known.memory_bandwidth_gb_s if known else None,
        pcie_gb_s=known.pcie_gb_s if known else None,
        compute_capability=gpu.compute_capability,
        bf16=float(gpu.compute_capability) >= 8.0,
        settings=known.settings if known else {},
    )


def board_profile(known: Profile) -> Profile:
    """A board whose GPU computes in the host's memory; what is in use there now is left to those who use it."""
    memory_bytes = total_host_bytes()
    budget_bytes = max(usable_host_bytes(), known.context_overhead + MIB)
    return known.model_copy(
        update={
            "name": f"auto ({known.name})",
            "memory": max(memory_bytes, budget_bytes + MIB),
            "reserve": max(memory_bytes - budget_bytes, MIB),
        }
    )


def known_board(name: str) -> Profile | None:
    """The shipped profile whose board `name` is, with the memory of this host within a tenth."""
    memory_bytes = psutil.virtual_memory().total  # a container's limit is not the board's
    for profile in map(load_profile, profile_names()):
        close = abs(profile.memory - memory_bytes) <= SAME_MEMORY * profile.memory
        if profile.unified_memory and close and any(part in name for part in profile.device_names):
            return profile
    return None


def known_card(gpu: Gpu) -> Profile | None:
    """The shipped profile with this card's name and, within a tenth, its memory."""
    for profile in map(load_profile, profile_names()):
        close = abs(profile.memory - gpu.memory_bytes) <= SAME_MEMORY * gpu.memory_bytes
        if gpu.name in profile.device_names and close:
            return profile
    return None


def total_host_bytes() -> int:
    """The host's memory, or what the cgroups allow of it."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in cgroup_memory())])


def usable_host_bytes() -> int:
    """The share of the host's memory that a run may take."""
    return int(CPU_SHARE * available_host_bytes())


def available_host_bytes() -> int:
    """The host's memory that nobody has: what is free, and what the cgroups leave of it."""
    available = [psutil.virtual_memory().available]
    return min(available + [max(0, limit - used) for limit, used in cgroup_memory()])


class DiskRoom(NamedTuple):
    """What a run may take of the disks that it writes to."""

    run_bytes: int | None  # of that of its directory; None: not known where it will be written
    cache_bytes: int  # of that of the cache folder
    is_one_disk: bool


def disk_room(output_dir: str | None) -> DiskRoom:
    """The room for a run in `output_dir`, and for what waits in the cache folder meanwhile."""
    cache = _there(cache_folder())
    cache_bytes = shutil.disk_usage(cache).free
    if output_dir is None:
        return DiskRoom(None, cache_bytes, is_one_disk=False)
    place = _there(Path(output_dir))
    return DiskRoom(disk_bytes_for(output_dir), cache_bytes, place.stat().st_dev == cache.stat().st_dev)


def cache_folder() -> Path:
    """Where what waits outside memory is kept while a run lasts. Source: XDG Base Directory Specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "agzo-edge"


def _there(place: Path) -> Path:
    """The place, or the first folder above it that exists."""
    place = place.absolute()
    return next(each for each in (place, *place.parents) if os.path.exists(each))  # noqa: PTH110  # raises nothing


def disk_bytes_for(directory: str) -> int:
    """What a run in `directory` may take of the disk that it lies on, or would: what is free, and what it has there."""
    place = Path(directory).absolute()
    free = shutil.disk_usage(_there(place)).free
    begun = place.rglob("*") if (place / "journal.jsonl").is_file() else ()  # of anything else not a file is looked at
    return free + sum(path.lstat().st_size for path in begun if path.is_file())


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, used) bytes of each control group that bounds this process's memory, version 1 or 2.

    A container sees its own group as the root; outside one, every ancestor of our group counts. `used` leaves out file
    pages that were not used lately, since the kernel drops them first.
    """
    bounds = []
    for folder in _cgroup_folders(root, own):
        limit = _number_in(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number_in(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and limit < UNLIMITED_BYTES:
            bounds.append((limit, max(0, (used or 0) - _reclaimable_bytes(folder))))
    return bounds


def _reclaimable_bytes(folder: Path) -> int:
    """A group's file pages that were not used lately."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("inactive_file", 0))


def _cgroup_folders(root: Path, own: Path) -> list[Path]:
    folders = [root, root / "memory"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / controllers  # version 2 names no controller: the root itself
        parts = [part for part in path.split("/") if part]
        folders += [base.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return folders


def _number_in(*files: Path) -> int | None:
    """The number in the first of `files` that holds one; "max" is none."""
    for file in files:
        try:
            return int(file.read_text().strip())
        except (OSError, ValueError):
            continue
    return None
