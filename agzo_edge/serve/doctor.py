"""A look at the machine: what is there, what is free, what is missing and how to install it."""

import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE

from agzo_edge.budget.detect import available_host_bytes, machine_profile, total_host_bytes
from agzo_edge.budget.gpu import board_name
from agzo_edge.budget.gpu_setup import GpuSetup, setup_faults, setup_notes, untold_memory
from agzo_edge.budget.profile import Profile
from agzo_edge.model.setup import gpu_setup
from agzo_edge.units import GIB, format_bytes

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
_OPTIONAL = ("tensorboard", "gguf", "jsonschema", "matplotlib", "nvidia-ml-py")
LITTLE_DISK_BYTES = 2 * GIB  # less than the smallest models in use and a few checkpoints


def examination() -> dict[str, Any]:
    """Versions, the machine as it was detected, what is free on it, and advice on everything that is missing."""
    machine, setup, free = machine_profile("auto"), gpu_setup(), free_facts()
    device = device_facts(setup)
    versions = {name: installed_version(name) for name in (*_PACKAGES, *_OPTIONAL)}
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: versions[name] for name in _PACKAGES},
        "optional": {name: versions[name] for name in _OPTIONAL},
        "detected": machine_facts(machine),
        "device": device,
        "free": free,
        "advice": [
            *package_advice(versions, with_cuda=device["kind"] == "cuda"),
            *setup_faults(setup),
            *setup_notes(setup, dtype="float16"),
            *machine_advice(machine, device, board=board_name()),
            *room_advice(free),
        ],
    }


def installed_version(name: str) -> str | None:
    """The version of an installed package, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine_facts(machine: Profile) -> dict[str, Any]:
    """What `--profile auto` takes this machine for; a number that nobody knows is None."""
    return {
        "profile": machine.name,
        "machine": machine.description,
        "memory_bytes": machine.memory,
        "budget_bytes": machine.budget_bytes,
        "context_overhead_bytes": machine.context_overhead,
        "unified_memory": machine.unified_memory,
        "memory_gb_per_s": machine.memory_bandwidth_gb_s,
        "pcie_gb_per_s": machine.pcie_gb_s,
    }


def device_facts(setup: GpuSetup) -> dict[str, Any]:
    """The device that torch would compute on."""
    if setup.capability is None:
        return {"kind": "cpu", "threads": torch.get_num_threads()}
    return {
        "kind": "cuda",
        "name": setup.card,
        "compute_capability": ".".join(map(str, setup.capability)),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "driver": setup.driver,
        "torch_cuda": setup.torch_cuda,
        "bitsandbytes_has_cuda": setup.bitsandbytes_has_cuda,
    }


def free_facts() -> dict[str, Any]:
    """Bytes that nobody has: of the GPU, of the host, here on the disk, and where models are downloaded to."""
    cache = Path(HF_HUB_CACHE)
    kept = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    gpu = {"device_bytes": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    return gpu | {
        "host_bytes": available_host_bytes(),
        "disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "model_cache_bytes": shutil.disk_usage(kept).free,
        "model_cache_folder": HF_HUB_CACHE,
    }


def package_advice(versions: Mapping[str, str | None], *, with_cuda: bool) -> Iterator[str]:
    """How to install each package that is missing; NVML's only where there is a GPU to read."""
    for name in _PACKAGES:
        if versions[name] is None:
            yield f"{name} is missing: pip install {name}"
    for name in _OPTIONAL:
        if versions[name] is None and (name != "nvidia-ml-py" or with_cuda):
            yield f"{name} is not installed, and optional: pip install {name}"


def machine_advice(machine: Profile, device: Mapping[str, Any], *, board: str) -> Iterator[str]:
    """What to do where torch and the machine do not meet, or the machine is not known."""
    on_cpu = device["kind"] == "cpu"
    if on_cpu and machine.unified_memory:
        yield f"this is a board with a GPU ({board}), and this torch has no CUDA: install NVIDIA's build for JetPack"
    elif on_cpu and machine.kind == "cpu" and shutil.which("nvidia-smi"):  # a card that is seen has been told of
        yield "there is an NVIDIA driver, but this torch has no CUDA: install torch's CUDA build"
    if not on_cpu and machine.kind == "cpu":
        yield untold_memory(device["name"])
    if machine.kind == "cuda" and machine.memory_bandwidth_gb_s is None:
        yield (
            "no profile knows this card, and what its libraries take is estimated: `agzo-edge profiles` lists those "
            "there are; copy the nearest, change it, and give its path to --profile"
        )
    if not on_cpu and "microsoft" in platform.release().lower():
        yield "under WSL the driver may move GPU memory to the host instead of failing: keep below --vram-limit"
    if on_cpu and device["threads"] > 1:
        yield "small models are often faster on a CPU with OMP_NUM_THREADS=1"


def room_advice(free: Mapping[str, Any]) -> Iterator[str]:
    """Where there is little room, or less than it looks."""
    allowed_bytes, there_bytes = total_host_bytes(), psutil.virtual_memory().total
    if allowed_bytes < there_bytes:
        yield (
            f"this container may use {format_bytes(allowed_bytes)} of the host's {format_bytes(there_bytes)}: "
            "the plan counts with the former"
        )
    if free["disk_bytes"] < LITTLE_DISK_BYTES:
        yield f"only {format_bytes(free['disk_bytes'])} are free here: give --output-dir on another disk"
    if free["model_cache_bytes"] < LITTLE_DISK_BYTES:
        yield (
            f"only {format_bytes(free['model_cache_bytes'])} are free in {free['model_cache_folder']}: "
            "set HF_HOME to a folder on another disk"
        )
