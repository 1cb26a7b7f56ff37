"""Starting values of all settings, by the name of a preset; every other source wins over them."""

from collections.abc import Mapping
from typing import Any

from agzo_edge.writers import ALL_LINEAR

# One shared Gaussian direction, forward difference, rank 1, a new basis every step: Algorithm 1 of the paper.
_PAPER = {
    "rank": 1,
    "guide": "none",
    "target_modules": (ALL_LINEAR,),
    "refresh_every": 1,
    "power_iterations": 3,
    "noise": "gaussian",
    "difference": "forward",
    "directions": "shared",
    "relative": False,
    "normalize": False,
    "clip": 0.0,
    "optimizer": "sgd",
    "mu": 1e-3,
    "learning_rate": 1e-3,
    "lr_schedule": "constant",
    "undo_every": 0,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "fast": {"max_steps": 150, "learning_rate": 0.2},
    "careful": {"max_steps": 1500, "learning_rate": 0.05, "undo_every": 25},
    "paper": _PAPER,
}
