"""What fits on a machine: the same run with rows and batches of many sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from agzo_edge.budget.detect import disk_room
from agzo_edge.budget.facts import ModelFacts
from agzo_edge.budget.memory import predicted_memory
from agzo_edge.budget.plan import Predict, in_pieces
from agzo_edge.budget.profile import Profile
from agzo_edge.config import RunConfig

LENGTHS = tuple(2**n for n in range(7, 15))  # 128 to 16,384 tokens in a row
BATCHES = tuple(2**n for n in range(7))  # 1 to 64 examples in a step

Outcome = Literal["fits", "in pieces", "refused"]


class Cell(NamedTuple):
    """One run of a sweep."""

    max_seq_length: int
    batch_size: int
    asked_bytes: int  # the predicted peak as asked for
    device_bytes: int  # as it would be taken; as asked for when it is refused
    outcome: Outcome
    how: str  # what the ladder changes


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The runs over all lengths and batches, the shortest rows first, of each length the smallest batch first."""

    profile_name: str
    limit_bytes: int
    cells: tuple[Cell, ...]

    def to_dict(self) -> dict[str, Any]:
        """The sweep for JSON; every amount in bytes."""
        return {
            "profile": self.profile_name,
            "limit_bytes": self.limit_bytes,
            "cells": [cell._asdict() for cell in self.cells],
        }


def memory_sweep(facts: ModelFacts, config: RunConfig, profile: Profile) -> Sweep:
    """The plans of the run that `config` describes, with every length of rows and every size of batch.

    Raises ModelError when target_modules matches no layer.
    """
    predict = partial(predicted_memory, facts, profile=profile, room=disk_room(config.output_dir))
    cells = tuple(
        _cell(_resized(config, length=length, batch_size=batch_size), predict)
        for length in _lengths(facts)
        for batch_size in BATCHES
    )
    return Sweep(profile_name=profile.name, limit_bytes=predict(config).limit_bytes, cells=cells)


def _lengths(facts: ModelFacts) -> Sequence[int]:
    """The lengths that the model has positions for, up to all of them."""
    if facts.positions is None:
        return LENGTHS
    return sorted({min(length, facts.positions) for length in LENGTHS})


def _resized(config: RunConfig, *, length: int, batch_size: int) -> RunConfig:
    micro = min(config.micro_batch_size or batch_size, batch_size)
    return config.model_copy(update={"max_seq_length": length, "batch_size": batch_size, "micro_batch_size": micro})


def _cell(config: RunConfig, predict: Predict) -> Cell:
    """The run as asked for, else on the first rung of the ladder that fits."""
    asked = predict(config)
    size = (config.max_seq_length, config.batch_size, asked.device_bytes)
    if (pieces := in_pieces(config, asked, predict)) is not None:
        return Cell(*size, pieces.device_bytes, "in pieces", pieces.how)
    return Cell(*size, asked.device_bytes, "fits" if asked.fits else "refused", "")
