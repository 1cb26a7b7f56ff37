"""The Triton kernels, on a GPU where Triton is there and they work; everywhere else torch computes the same."""

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MAX_RANK = 16  # of a branch: wider ones are tensor cores' work
_KERNELS = "agzo_edge.numerics.kernels"


def kernels_for(tensor: Tensor, *, rank: int) -> Any | None:
    """`kernels.py`, where it can be asked for branches of this rank on the tensor's device; else None."""
    if not tensor.is_cuda or rank > MAX_RANK or kernel_fault(tensor.device) is not None:
        return None
    return importlib.import_module(_KERNELS)


@cache
def kernel_fault(device: torch.device) -> str | None:
    """Why the kernels are not used on a device; None where each was tried on a small case and gives torch's numbers.

    Triton compiles a kernel when it is first used: for that it needs a C compiler, and a card that it knows.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module(_KERNELS).require_torchs_numbers(device)
    except Exception as error:  # noqa: BLE001  # whatever keeps them from working here, torch can do without
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
