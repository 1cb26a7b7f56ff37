"""The bases of a window on disk: what replay cannot compute again bit for bit.

`bases/step-00000025.safetensors` holds, for the window that opened at step 25, each input group's basis
(in_features, rank) float32, each guided layer's guide (out_features, rank) float32 and the scales of the
layers, float64, with a checksum (tensors.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from agzo_edge.errors import AdapterError
from agzo_edge.record.files import atomic_write_bytes, make_directory, writing
from agzo_edge.record.tensors import checked_bytes, read_checked

DIRECTORY = "bases"
Shapes = Mapping[str, tuple[int, ...]]  # of a window's tensors, by the names that they have in its file


@dataclass(frozen=True)
class WindowBases:
    """What a window fixed when it opened."""

    bases: Mapping[int, Tensor]  # by input group: (in_features, rank) float32
    scales: Sequence[float]  # by layer
    guides: Mapping[int, Tensor] = field(default_factory=dict)  # by layer: (out_features, rank) float32

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        parts = {"basis": self.bases, "guide": self.guides}
        named = {f"{kind}.{index}": tensor for kind, part in parts.items() for index, tensor in part.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        return tensors | {"scales": torch.tensor(self.scales, dtype=torch.float64)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], shapes: Shapes) -> Self:
        """The window with these tensors. Raises ValueError when they are not what a run of these shapes keeps."""
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != dict(shapes) or not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("not the bases of this run's layers")

        def part(kind: str) -> dict[int, Tensor]:
            names = (name for name in shapes if name.startswith(f"{kind}."))
            return {int(name.partition(".")[2]): tensors[name].float() for name in names}

        return cls(part("basis"), tensors["scales"].tolist(), part("guide"))


def bases_path(run_dir: Path, step: int) -> Path:
    """Where the bases of the window that opened at `step` are kept."""
    return run_dir / DIRECTORY / f"step-{step:08d}.safetensors"


def save_bases(run_dir: Path, step: int, window: WindowBases) -> None:
    """Leave the window's bases on the disk, whole or not at all. Raises AgzoError when they cannot be written."""
    path = bases_path(run_dir, step)
    with writing(path):
        make_directory(path.parent)
    atomic_write_bytes(path, checked_bytes(window.tensors()))


def load_bases(run_dir: Path, step: int, shapes: Shapes) -> WindowBases:
    """The bases of the window that opened at `step`.

    Raises AdapterError when the file is missing, unreadable, or holds anything else than tensors of `shapes`.
    """
    path = bases_path(run_dir, step)
    if not path.is_file():
        raise AdapterError(f"{path}: the bases of the window at step {step} are missing: the run cannot be rebuilt")
    try:
        return WindowBases.of_tensors(read_checked(path), shapes)
    except AdapterError as error:
        raise AdapterError(f"{error}. The steps before it can be had by `replay --until-step {step}`") from None
    except ValueError:
        raise AdapterError(f"{path}: does not hold the bases of this run's layers") from None
