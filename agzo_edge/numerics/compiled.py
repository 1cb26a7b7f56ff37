"""The Triton kernels, where there are a GPU and Triton; everywhere else torch computes the same."""

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor

MAX_RANK = 16  # of a branch: wider ones are tensor cores' work


def kernels_for(tensor: Tensor, *, rank: int) -> Any | None:
    """`kernels.py`, where it can be asked for branches of this rank on the tensor's device; else None."""
    return _kernels() if tensor.is_cuda and rank <= MAX_RANK else None


@cache
def _kernels() -> Any | None:
    return importlib.import_module("agzo_edge.numerics.kernels") if find_spec("triton") else None
