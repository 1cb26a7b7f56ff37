"""agzo-edge: fine-tune a quantized language model with forward passes only, inside a memory budget.

import agzo_edge
plan = agzo_edge.plan("Qwen/Qwen3-8B", profile="rtx-3060-12gb", max_seq_length=2048, batch_size=8)
run = agzo_edge.finetune("Qwen/Qwen3-8B", "notes.jsonl", output_dir="adapters/notes")
model = agzo_edge.load("Qwen/Qwen3-8B", adapter=run.adapter)
print(model.generate("Summarise my week."))
"""

from typing import TYPE_CHECKING, Any

from agzo_edge.errors import (
    AdapterError,
    AgzoError,
    BudgetBrokenError,
    BudgetError,
    ConfigError,
    DataError,
    ModelError,
    NonFiniteLossError,
    RewardError,
    UsageError,
)

if TYPE_CHECKING:
    from agzo_edge.api import check_numerics, doctor, evaluate, export, finetune, load, plan, replay, report, sweep
    from agzo_edge.cli.watch import show_progress

__version__ = "0.1.0"

_VERBS = ("check_numerics", "doctor", "evaluate", "export", "finetune", "load", "plan", "replay", "report", "sweep")


def __getattr__(name: str) -> Any:
    """The verbs of api.py, imported when first used: torch takes seconds to load, and --help needs none of it."""
    if name in _VERBS:
        from agzo_edge import api

        return getattr(api, name)
    if name == "show_progress":
        from agzo_edge.cli.watch import show_progress

        return show_progress
    raise AttributeError(f"module 'agzo_edge' has no attribute {name!r}")


__all__ = [
    "AdapterError",
    "AgzoError",
    "BudgetBrokenError",
    "BudgetError",
    "ConfigError",
    "DataError",
    "ModelError",
    "NonFiniteLossError",
    "RewardError",
    "UsageError",
    "__version__",
    "check_numerics",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "load",
    "plan",
    "replay",
    "report",
    "show_progress",
    "sweep",
]
