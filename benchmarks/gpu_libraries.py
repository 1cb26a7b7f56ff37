"""What the libraries take of a device before a model is there, piece by piece as they are first used."""

from collections.abc import Callable

import torch
from gpu_measure import Row, Rows, sync
from gpu_models import Setting
from torch.nn.functional import scaled_dot_product_attention

from agzo_edge.model.device import chosen_dtype
from agzo_edge.model.memory import used_bytes
from agzo_edge.model.weights import DenseWeight, quantized
from agzo_edge.model.workspace import Workspace
from agzo_edge.numerics.basis import next_basis, starting_basis


def libraries(setting: Setting) -> Rows:
    """All that this process has of the device after each first use; of the tensors themselves next to nothing is left.

    The first section, since none is used yet. What torch's allocator still holds is told apart.
    """
    before = used_bytes(setting.device)
    for name, use in _uses(setting).items():
        use()
        sync(setting.device)
        setting.free()
        now = used_bytes(setting.device)
        yield _row(setting, name, taken_bytes=now - before, used_bytes=now)
        before = now


def _row(setting: Setting, name: str, **n_bytes: int) -> Row:
    held = {"in_allocator_bytes": torch.cuda.memory_reserved(setting.device)} if setting.on_gpu else {}
    return {"first_use": name} | n_bytes | held


def _uses(setting: Setting) -> dict[str, Callable[[], object]]:
    device, dtype = setting.device, chosen_dtype("auto", setting.device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def quantize_and_back() -> None:
        quantized(
            DenseWeight(normal(512, 512)), setting.config(), device=device, dtype=dtype, workspace=Workspace()
        ).dense()

    start = starting_basis(512, 8).to(device)
    return {
        "context, a tensor": lambda: torch.ones(1, device=device),
        "random numbers": lambda: normal(64, 64),
        "a product in the compute dtype": lambda: normal(512, 512) @ normal(512, 512),
        "a product in float32": lambda: normal(512, 512).float() @ start,
        "bitsandbytes": quantize_and_back,
        "attention": lambda: scaled_dot_product_attention(*(normal(1, 8, 128, 64) for _ in range(3)), is_causal=True),
        "attention with a mask": lambda: scaled_dot_product_attention(
            *(normal(1, 8, 128, 64) for _ in range(3)), attn_mask=torch.ones(128, 128, dtype=torch.bool, device=device)
        ),
        "a basis": lambda: next_basis(normal(512, 512).float() @ start, start),
        "QR": lambda: torch.linalg.qr(normal(512, 64).float()),
        "SVD": lambda: torch.linalg.svd(normal(64, 64).float()),
    }
