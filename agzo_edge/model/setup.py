"""The device as torch, bitsandbytes and the driver see it here, and the refusal of one that cannot be used."""

import os
from collections.abc import Iterator

import torch

from agzo_edge.budget.gpu import visible_gpu
from agzo_edge.budget.gpu_setup import GpuSetup, setup_faults, setup_notes, untold_memory
from agzo_edge.budget.memory import compute_dtype, computes_on_cpu
from agzo_edge.budget.profile import Profile
from agzo_edge.config import RunConfig
from agzo_edge.errors import ConfigError, numbered
from agzo_edge.model.device import chosen_device
from agzo_edge.numerics.compiled import kernel_fault

_WITHOUT_16_BIT_PRODUCTS = ("NO AVX", "AVX2")  # x86, in torch's words


def gpu_setup() -> GpuSetup:
    """What is there now; a machine without a card gives an empty one."""
    seen, usable = visible_gpu(), torch.cuda.is_available()
    if seen is None and not usable:
        return GpuSetup(torch_cuda=torch.version.cuda)
    return GpuSetup(
        card=torch.cuda.get_device_name() if usable else seen and seen.name,
        driver=seen.driver or None if seen else None,
        torch_cuda=torch.version.cuda,
        capability=torch.cuda.get_device_capability() if usable else None,
        compiled_for=tuple(torch.cuda.get_arch_list()) if usable else (),
        bitsandbytes_has_cuda=usable and _bitsandbytes_has_cuda(),
        kernel_fault=kernel_fault(chosen_device("cuda")) if usable else None,
    )


def _bitsandbytes_has_cuda() -> bool:
    """Whether the library that bitsandbytes has loaded holds kernels for a GPU."""
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    from bitsandbytes.cextension import lib

    return bool(lib.compiled_with_cuda)


def require_usable_device(config: RunConfig, machine: Profile) -> tuple[str, ...]:
    """What a person should know of the device that the run computes on.

    Raises ConfigError when there is a GPU and its driver, torch or bitsandbytes do not let it be used.
    """
    if computes_on_cpu(config, machine):
        return tuple(_cpu_notes(compute_dtype(config, machine)))
    setup = gpu_setup()
    faults = list(setup_faults(setup, quantized=config.load_in_4bit or config.load_in_8bit))
    if faults:
        raise ConfigError(f"the GPU cannot be used (--device cpu computes without it):\n{numbered(faults)}")
    return tuple(setup_notes(setup, dtype=compute_dtype(config, machine)))


def on_planned_device(config: RunConfig, machine: Profile) -> RunConfig:
    """The run with the device that its plan is for, so that it is loaded there.

    Raises ConfigError where torch does not see it, and for a card whose memory nobody tells.
    """
    seen = torch.cuda.is_available()
    if computes_on_cpu(config, machine):
        if seen and (config.device, config.profile) == ("auto", "auto"):
            raise ConfigError(f"{untold_memory(torch.cuda.get_device_name())}; --device cpu computes without it")
        return config.model_copy(update={"device": "cpu"})
    if not seen:
        raise ConfigError(
            f"profile '{machine.name}' is a GPU's, and torch sees no CUDA device here: use --profile auto to compute "
            f"on this machine, or `agzo-edge plan` to look at that one"
        )
    return config.model_copy(update={"device": "cuda"})


def _cpu_notes(dtype: str) -> Iterator[str]:
    """What a person should know of computing in `dtype` on the CPU."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if dtype != "float32" and vectors in _WITHOUT_16_BIT_PRODUCTS:
        yield (
            f"this CPU ({vectors}) has no instructions for products in 16 bit: in {dtype} they take many times as long "
            f"as in float32 (70 times, measured on one): --dtype float32"
        )
