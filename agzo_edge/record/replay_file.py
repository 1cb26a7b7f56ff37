"""A run as one file: what a replay needs, in safetensors.

Each window's bases and scales once, and for each step its number, learning rate, projected gradients and
their weights; the noise is drawn again from the seed in the header. The header is the journal's, as the bytes
of its JSON; so is where the run went back, by the step's number. All of it is under one checksum (tensors.py).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agzo_edge.errors import AdapterError
from agzo_edge.record.bases import WindowBases
from agzo_edge.record.files import atomic_write_bytes, make_directory, writing
from agzo_edge.record.strict_json import strict_object
from agzo_edge.record.tensors import checked_bytes, read_checked

HEADER_NAME = "header"
COURSE_NAME = "course"
COURSE_FIELDS = ("watched", "went_back_to", "ended_at")  # of few records
_START = "start."
_WINDOW = "window."  # then the step that opened it, and the tensor's name in its file
_WINDOW_TENSOR = re.compile(r"scales|(basis|guide)\.\d+")


@dataclass(frozen=True)
class ReplayFile:
    """What the file holds."""

    header: Mapping[str, Any]  # the journal's
    records: Sequence[Mapping[str, Any]]  # step, learning_rate, projected, weights, and few with COURSE_FIELDS
    windows: Mapping[int, WindowBases]  # by the step that opened them
    start: Mapping[str, Tensor]  # the learner's state at step 0, of a run that began with an adapter


def save_replay(path: Path, run: ReplayFile) -> None:
    """Leave the run at `path`, whole or not at all. Raises AgzoError."""
    records = run.records
    tensors = {
        "step": torch.tensor([record["step"] for record in records], dtype=torch.int64),
        "learning_rate": torch.tensor([record["learning_rate"] for record in records], dtype=torch.float64),
        "projected": torch.tensor([record["projected"] for record in records], dtype=torch.float32),
        "weights": torch.tensor([record["weights"] for record in records], dtype=torch.float32),
    }
    for step, window in run.windows.items():
        tensors |= {f"{_WINDOW}{step}.{name}": tensor for name, tensor in window.tensors().items()}
    tensors |= {_START + name: tensor.contiguous() for name, tensor in run.start.items()}
    course = {str(r["step"]): {name: r[name] for name in COURSE_FIELDS if name in r} for r in records}
    tensors[COURSE_NAME] = _as_bytes({step: fields for step, fields in course.items() if fields})
    tensors[HEADER_NAME] = _as_bytes(run.header)
    with writing(path):
        make_directory(path.parent)
    atomic_write_bytes(path, checked_bytes(tensors))


def load_replay(path: Path) -> ReplayFile:
    """The run in the file at `path`. Raises AdapterError when it is no such file, or is damaged."""
    tensors = read_checked(path)
    try:
        header, course = (strict_object(tensors[name].numpy().tobytes()) for name in (HEADER_NAME, COURSE_NAME))
        records = [
            {"step": step, "learning_rate": rate, "projected": projected, "weights": weights}
            | course.get(str(step), {})
            for step, rate, projected, weights in zip(
                *(tensors[name].tolist() for name in ("step", "learning_rate", "projected", "weights")), strict=True
            )
        ]
    except KeyError as error:
        raise AdapterError(f"{path}: is no run exported by agzo-edge: {error.args[0]} is missing") from None
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from None
    start = {name.removeprefix(_START): tensor for name, tensor in tensors.items() if name.startswith(_START)}
    return ReplayFile(header, records, _windows(tensors, path), start)


def _as_bytes(fields: Mapping[str, Any]) -> Tensor:
    """JSON in a tensor."""
    return torch.frombuffer(bytearray(json.dumps(dict(fields)).encode()), dtype=torch.uint8)


def _windows(tensors: Mapping[str, Tensor], path: Path) -> dict[int, WindowBases]:
    """The windows' bases by the step that opened them."""
    windows: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_WINDOW):
            step, _, name = key.removeprefix(_WINDOW).partition(".")
            if not step.isdecimal() or not _WINDOW_TENSOR.fullmatch(name):
                raise AdapterError(f"{path}: {key} is no tensor of a window")
            windows.setdefault(int(step), {})[name] = tensor
    try:
        return {step: WindowBases.of_tensors(part, _shapes(part)) for step, part in windows.items()}
    except (KeyError, ValueError) as error:
        raise AdapterError(f"{path}: the bases of a window cannot be used: {error}") from None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Those that the tensors have: the learner that takes them compares them with its own."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
