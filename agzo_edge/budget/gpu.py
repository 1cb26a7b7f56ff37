"""The GPU of this machine as its driver or its firmware tells of it: NVML, nvidia-smi, the device tree."""

import csv
import importlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from agzo_edge.units import MIB

SMI_TIMEOUT_S = 10

_SMI_FIELDS = "name,memory.total,memory.free,compute_cap,driver_version"


class Gpu(NamedTuple):
    """What the driver says about the first visible GPU."""

    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: str
    driver: str = ""  # its version, where it tells


def hides_gpus() -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves no GPU to us."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def visible_gpu() -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves to us; None when the driver shows none."""
    if hides_gpus():
        return None
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the driver counts so; CUDA would take the fastest first
    selected = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return _ask_nvml(selected) or _ask_smi(selected)


def _ask_nvml(selected: str) -> Gpu | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        if selected.isdigit():
            handle = nvml.nvmlDeviceGetHandleByIndex(int(selected))
        else:
            handle = nvml.nvmlDeviceGetHandleByUUID(selected)
        name = nvml.nvmlDeviceGetName(handle)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        capability = ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle)))
        driver = nvml.nvmlSystemGetDriverVersion()
        name, driver = (text if isinstance(text, str) else text.decode() for text in (name, driver))
        return Gpu(name, memory.total, memory.free, capability, driver)
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _ask_smi(selected: str) -> Gpu | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--id={selected}", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return gpu_from_csv(answer.stdout)


def gpu_from_csv(text: str) -> Gpu | None:
    """The GPU in nvidia-smi's first line (name, total and free MiB, compute capability, driver), or None."""
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == 5 and row[1].strip().isdigit() and row[2].strip().isdigit():
            return Gpu(row[0].strip(), int(row[1]) * MIB, int(row[2]) * MIB, row[3].strip(), row[4].strip())
        return None
    return None


def board_name(file: Path = Path("/proc/device-tree/model")) -> str:
    """What the firmware calls this board; nothing where it does not say."""
    try:
        return file.read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""
