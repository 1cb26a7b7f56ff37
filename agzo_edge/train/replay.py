"""A run's learning done again from its records: no data, no model weights, no forward pass."""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch

from agzo_edge.errors import ConfigError
from agzo_edge.record.bases import WindowBases
from agzo_edge.train.learner import Learner, Measurement

BasesOf = Callable[[int], WindowBases]  # what the window that opened at a step fixed


def replay(
    learner: Learner,
    records: Iterable[Mapping[str, Any]],
    bases_of: BasesOf,
    *,
    skip: Container[int] = (),  # steps whose part of the sum is left out
) -> None:
    """Bring `learner` to where it was after `records`: the same operations in the same order.

    The result is bit for bit that of the run on the same kind of machine, but for target = dequantized, whose run
    has rounded its steps into the weights: the adapter is near the run's then. With the sgd optimizer the
    coefficients are a sum over steps, so that some may be left out; the others stay as they were, and no
    loss is measured anew. Raises ConfigError for `skip` with another optimizer. Source: DESIGN section 3.
    """
    if skip and learner.config.optimizer != "sgd":
        raise ConfigError(
            f"steps cannot be skipped: with optimizer {learner.config.optimizer!r} every step depends on those before "
            f"it; only sgd is a sum"
        )
    for record in records:
        step = int(record["step"])
        if record.get("went_back_to") is not None:
            learner.go_back()
        elif record.get("watched"):
            learner.watch([float(loss) for loss in record["watched"]], step=step)
        if learner.window_starts(step):
            learner.close_window(step)
            learner.enter(bases_of(step))
            learner.open_window()
        measured = Measurement(
            torch.tensor(record["projected"], dtype=torch.float32),
            torch.tensor(record["weights"], dtype=torch.float32),
        )
        learner.apply(step, measured, learning_rate=float(record["learning_rate"]), move=step not in skip)
        if record.get("ended_at") is not None:
            learner.go_back()
