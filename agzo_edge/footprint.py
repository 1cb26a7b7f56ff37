"""What a run really took of its device's memory, part by part, beside what was predicted."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from agzo_edge.budget.memory import MemoryPlan
from agzo_edge.model.load import import_libraries
from agzo_edge.model.memory import give_back, load_context, used_bytes

# The plan's components that each part is made of; what is none of the others' comes and goes within a step.
PARTS = {
    "libraries and data": ("context", "tokenizer", "hub's library", "data"),
    "model": ("weights", "embeddings", "norms", "opened layers", "their stored form", "streamed"),
    "learned": ("adapter", "window", "dequantization"),
}
WORK = "a step's work"


@dataclass
class Footprint:
    """What was in use at the ends of a run's stages: before the model, with it, and after its last step."""

    device: torch.device
    marks: list[int] = field(default_factory=list)  # bytes in use, ascending as a rule

    def __post_init__(self) -> None:
        import_libraries()
        import_module("peft")  # the first save will
        load_context(self.device)
        self.mark()

    def mark(self) -> None:
        """Note what is in use at the end of a stage, and not what the allocator keeps of it."""
        give_back(self.device)
        self.marks.append(used_bytes(self.device))

    def report(self, plan: MemoryPlan, *, peak_bytes: int) -> dict[str, Any]:
        """Each stage's growth beside its prediction, and the rest up to the peak; nothing before all marks are there.

        What was learned is measured after the last step, and may be less than what was planned: an adapter is
        at its widest shortly before it is compressed, and in a step that opens a window.
        """
        return dict(self._parts(plan, peak_bytes=peak_bytes)) if len(self.marks) == len(PARTS) else {}

    def _parts(self, plan: MemoryPlan, *, peak_bytes: int) -> Iterator[tuple[str, dict[str, int]]]:
        before = 0
        for (name, components), mark in zip(PARTS.items(), self.marks, strict=True):
            yield name, {"predicted_bytes": plan.bytes_of(*components), "measured_bytes": mark - before}
            before = mark
        named = sum(plan.bytes_of(*components) for components in PARTS.values())
        yield WORK, {"predicted_bytes": plan.device_bytes - named, "measured_bytes": peak_bytes - before}
