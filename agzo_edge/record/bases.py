"""The bases of a window on disk: what replay cannot compute again bit for bit.

`bases/step-00000025.safetensors` holds, for the window that opened at step 25, each input group's basis
(in_features, rank) float32 and the scales of the layers, float64, with a checksum (tensors.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from agzo_edge.errors import AdapterError
from agzo_edge.record.files import atomic_write_bytes, make_directory, writing
from agzo_edge.record.tensors import checked_bytes, read_checked

DIRECTORY = "bases"


@dataclass(frozen=True)
class WindowBases:
    """What a window fixed when it opened."""

    bases: Mapping[int, Tensor]  # by input group: (in_features, rank) float32
    scales: Sequence[float]  # by layer


def bases_path(run_dir: Path, step: int) -> Path:
    """Where the bases of the window that opened at `step` are kept."""
    return run_dir / DIRECTORY / f"step-{step:08d}.safetensors"


def save_bases(run_dir: Path, step: int, window: WindowBases) -> None:
    """Leave the window's bases on the disk, whole or not at all. Raises AgzoError when they cannot be written."""
    tensors = {f"basis.{group}": basis.detach().cpu().contiguous() for group, basis in window.bases.items()}
    tensors["scales"] = torch.tensor(window.scales, dtype=torch.float64)
    path = bases_path(run_dir, step)
    with writing(path):
        make_directory(path.parent)
    atomic_write_bytes(path, checked_bytes(tensors))


def load_bases(run_dir: Path, step: int, shapes: Mapping[int, tuple[int, int]], n_layers: int) -> WindowBases:
    """The bases of the window that opened at `step`.

    `shapes` are the (in_features, rank) that each group must have. Raises AdapterError when the file is missing,
    unreadable, or holds anything else than these groups and `n_layers` scales.
    """
    path = bases_path(run_dir, step)
    if not path.is_file():
        raise AdapterError(f"{path}: the bases of the window at step {step} are missing: the run cannot be rebuilt")
    tensors = read_checked(path)
    expected: dict[str, tuple[int, ...]] = {f"basis.{group}": shape for group, shape in shapes.items()}
    expected["scales"] = (n_layers,)
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != expected or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise AdapterError(f"{path}: does not hold the bases of this run's layers")
    bases = {group: tensors[f"basis.{group}"].float() for group in shapes}
    return WindowBases(bases, tensors["scales"].tolist())
