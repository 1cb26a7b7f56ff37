"""Which device, dtype and threads we compute with."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from agzo_edge.errors import ConfigError

SMALL_MODEL_PARAMETERS = 50_000_000
THREADS = torch.get_num_threads()  # torch's own number, or that of OMP_NUM_THREADS, before any model is loaded
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chosen_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda) means here.

    Raises ConfigError when CUDA is asked for on a machine without it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', and torch sees no CUDA device here: use --device cpu, or see doctor")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype that `name` means on `device`: auto is float32 on a CPU, 16 bit on a GPU."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def use_threads(n_threads: int, *, n_parameters: int) -> None:
    """Let torch compute with `n_threads` CPU threads; 0 chooses one for a small model, and else torch's own number.

    Handing a matmul of a few hundred columns to several threads costs more than the matmul
    (docs/decisions/0004). A result's last bits depend on the number, so a run keeps to one.
    """
    if n_threads == 0:
        n_threads = 1 if n_parameters < SMALL_MODEL_PARAMETERS else THREADS
    torch.set_num_threads(n_threads)


@contextmanager
def torch_as_ours() -> Iterator[None]:
    """Inside, torch computes as this package means it to; after it dtype, threads and modes are the caller's again."""
    with ExitStack() as modes:
        modes.callback(torch.set_num_threads, torch.get_num_threads())
        modes.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        modes.enter_context(torch.inference_mode(mode=False))
        modes.enter_context(torch.enable_grad())
        modes.enter_context(torch.autocast("cpu", enabled=False))
        if torch.cuda.is_available():
            modes.enter_context(torch.autocast("cuda", enabled=False))
        yield


@contextmanager
def with_threads(n_threads: int) -> Iterator[None]:
    """Inside, torch has so many threads; after it those of before."""
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on `device`, without waiting for it.

    From pinned memory: a copy from other memory waits until the GPU has finished all that is queued, for each layer.
    """
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
