"""Whether driver, card, torch and bitsandbytes go together: asked before anything is loaded."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# The oldest driver for each major version of CUDA. Source: NVIDIA, "CUDA Compatibility", minor version compatibility.
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_BF16_CAPABILITY = (8, 0)  # Ampere; older cards emulate bfloat16, slowly


@dataclass(frozen=True, kw_only=True)
class GpuSetup:
    """What a GPU, its driver and the installed packages say of themselves."""

    card: str | None = None  # as driver or torch calls it; None where neither shows one
    driver: str | None = None  # 580.159.04; None where it does not tell
    torch_cuda: str | None = None  # the CUDA that torch was built for; None in a build for CPUs
    capability: tuple[int, int] | None = None  # as torch tells it; None where torch can use no card
    compiled_for: tuple[str, ...] = ()  # torch's kernels: sm_75, ..., compute_120
    bitsandbytes_has_cuda: bool = False  # its library for this CUDA was there and could be loaded
    kernel_fault: str | None = None  # why our own kernels do not work on the card; None where they do


def setup_faults(setup: GpuSetup, *, quantized: bool = True) -> Iterator[str]:
    """What keeps a run off the card, each with what to do; nothing where there is no card or all is well."""
    if setup.card is None:
        return
    if setup.torch_cuda is None:
        yield f"there is a GPU ({setup.card}), but this torch has no CUDA: install torch's CUDA build"
    elif setup.capability is None:
        yield _unusable(setup)
    elif setup.compiled_for and not has_kernels(setup.capability, setup.compiled_for):
        yield (
            f"{setup.card} has compute capability {_dotted(setup.capability)}, and this torch has kernels for "
            f"{', '.join(setup.compiled_for)} only: install a torch that serves the card"
        )
    elif quantized and not setup.bitsandbytes_has_cuda:
        yield (
            f"bitsandbytes has no library for CUDA {setup.torch_cuda}, torch's, that could be loaded: upgrade it, and "
            f"see what `python -m bitsandbytes` says; --no-load-in-4bit does without, in four times the memory"
        )


def setup_notes(setup: GpuSetup, *, dtype: str) -> Iterator[str]:
    """What a person should know of computing in `dtype` on the card."""
    if setup.capability is None:
        return
    if setup.kernel_fault is not None:
        yield f"steps take longer than they need on {setup.card}, without Triton's kernels: {setup.kernel_fault}"
    if setup.capability >= _BF16_CAPABILITY:
        return
    which = f"{setup.card} (compute capability {_dotted(setup.capability)})"
    if dtype == "float16":
        yield (
            f"{which} has no bfloat16: layers compute in float16; losses, bases and what is learned are in float32. "
            f"Should a loss not be finite, activations passed float16's 65,504: --dtype float32"
        )
    if dtype == "bfloat16":
        yield f"{which} only emulates bfloat16, slowly: --dtype float16 is its own"


def untold_memory(card: str) -> str:
    """What to do with a card that torch sees, and of which no driver tells more."""
    return f"torch sees {card}, and no driver tells its memory: give a profile with --profile FILE.toml"


def has_kernels(capability: tuple[int, int], compiled_for: tuple[str, ...]) -> bool:
    """Whether code for these targets runs on such a card.

    Machine code (sm) runs within its major version from its minor version on, intermediate code (compute) on every
    later card. Source: NVIDIA, "CUDA C++ Programming Guide", section on compatibility.
    """
    for target in compiled_for:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", target)
        if found is None:
            continue
        made_for = int(found[2]), int(found[3])
        same_major = made_for[0] == capability[0]
        if made_for <= capability and (same_major or found[1] == "compute"):
            return True
    return False


def _unusable(setup: GpuSetup) -> str:
    """Why a torch with CUDA sees no card where there is one."""
    needed = _OLDEST_DRIVER.get(int(str(setup.torch_cuda).partition(".")[0]))
    told = setup.driver.partition(".")[0] if setup.driver else ""
    if needed and told.isdigit() and int(told) < needed:
        return (
            f"the driver of {setup.card} is {setup.driver}, and torch's CUDA {setup.torch_cuda} needs {needed} or "
            f"newer: update the driver, or install a torch for an older CUDA"
        )
    return (
        f"the driver ({setup.driver or 'version unknown'}) shows {setup.card}, and torch's CUDA {setup.torch_cuda} "
        f"cannot use it: restart after a driver's update, and look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
