"""A look at the machine: what is there, what is free, what is missing."""

import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from agzo_edge.budget.detect import machine_profile, usable_host_bytes

_PACKAGES = (
    "torch",
    "bitsandbytes",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "datasets",
    "numpy",
)
_OPTIONAL = {"tensorboard": "tensorboard", "gguf": "gguf", "nvidia-ml-py": "cuda"}  # package: our extra


def examination() -> dict[str, Any]:
    """Versions, memory, device and disk, with a line of advice for everything that is missing."""
    machine = machine_profile("auto")
    versions = {name: installed_version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": versions,
        "optional": {name: installed_version(name) for name in _OPTIONAL},
        "profile": machine.name,
        "device": device_facts(),
        "budget_bytes": machine.budget_bytes,
        "host_free_bytes": usable_host_bytes(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "advice": advice(versions),
    }


def installed_version(name: str) -> str | None:
    """The version of an installed package, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device_facts() -> dict[str, Any]:
    """The device that a run would compute on."""
    if not torch.cuda.is_available():
        return {"kind": "cpu", "threads": torch.get_num_threads()}
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    return {
        "kind": "cuda",
        "name": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
    }


def advice(versions: dict[str, str | None]) -> list[str]:
    """What to install or to do, one line each; nothing when all is well."""
    lines = [f"{name} is missing: pip install {name}" for name, version in versions.items() if version is None]
    lines += [
        f'{name} is not installed, and optional: pip install "agzo-edge[{extra}]"'
        for name, extra in _OPTIONAL.items()
        if installed_version(name) is None and (extra != "cuda" or torch.cuda.is_available())
    ]
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        lines.append("there is an NVIDIA driver, but this torch has no CUDA: install torch's CUDA build")
    if not torch.cuda.is_available() and torch.get_num_threads() > 1:
        lines.append("small models are often faster on a CPU with OMP_NUM_THREADS=1")
    return lines
