"""How good the model is on held-out examples, with everything it has learned and no perturbation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from agzo_edge.data_config import Objective
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.scores import (
    Interval,
    confusion,
    macro_f1,
    macro_f1_interval,
    mean_interval,
    share_interval,
)
from agzo_edge.train.data import Batch, Example, collate, pad_id_of
from agzo_edge.train.length import longest_tokens
from agzo_edge.train.objective import Goal, Outcome


@dataclass(frozen=True)
class Metrics:
    """The result of one evaluation."""

    examples: int
    loss: float  # lm: mean per label token, in nats; else the mean over examples
    accuracy: float | None = None  # share of examples whose right option, or better answer, is preferred
    macro_f1: float | None = None  # choice: over the places in the list of options
    reward: float | None = None  # mean reward of the likeliest answers
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of 95 %, by the names above

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them: null for a number that is not finite."""
        told = asdict(self) | {"intervals": {name: [*map(_finite, span)] for name, span in self.intervals.items()}}
        return told | {"loss": _finite(self.loss), "reward": _finite(self.reward)}

    @property
    def is_likelihood(self) -> bool:
        """Whether the loss is that of a text, which has a perplexity."""
        return self.accuracy is None and self.reward is None

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700.0))  # e**709 is the largest float64


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


@torch.no_grad()
def evaluate(
    model: EdgeModel,
    examples: Sequence[Example],
    *,
    objective: Objective,
    batch_size: int,
    goal: Goal,  # the objective with its settings
) -> Metrics:
    """The mean loss over `examples` and what else the objective tells, in batches of like length.

    lm: weighted by label tokens, as perplexity is; otherwise every example counts the same.
    """
    outcomes: list[Outcome] = []
    weights: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []
    for batch in _batches(examples, model, objective=objective, batch_size=batch_size):
        on_device = batch.to(model.device)
        with model.context.running(mask=on_device.attention_mask.bool()):
            outcomes.append(goal.outcome(model, on_device))
        share = int(batch.is_label.sum()) if objective == "lm" else len(batch.places)
        weights.append(batch.weights.double() * share)
        answers.append(batch.answer)
    losses = torch.cat([outcome.losses.cpu().double() for outcome in outcomes]).numpy()
    predicted = [outcome.predicted.cpu() for outcome in outcomes if outcome.predicted is not None]
    metrics = _mean_loss(losses, torch.cat(weights).numpy())
    if objective == "reward":
        return _with_reward(metrics)
    if not predicted:
        return metrics
    told = _with_accuracy(metrics, torch.cat(predicted), torch.cat(answers))
    return _with_macro_f1(told, torch.cat(predicted), torch.cat(answers)) if objective == "choice" else told


def _mean_loss(losses: np.ndarray, weights: np.ndarray) -> Metrics:
    loss = float(weights @ losses / weights.sum())
    return Metrics(len(losses), loss, intervals={"loss": mean_interval(losses, weights)})


def _with_reward(metrics: Metrics) -> Metrics:
    """The loss is minus the reward, and so is its interval."""
    low, high = metrics.intervals["loss"]
    return replace(metrics, reward=0.0 - metrics.loss, intervals={**metrics.intervals, "reward": (-high, -low)})


def _with_accuracy(metrics: Metrics, predicted: torch.Tensor, right: torch.Tensor) -> Metrics:
    n_right = int((predicted == right).sum())
    interval = share_interval(n_right, metrics.examples)
    return replace(metrics, accuracy=n_right / metrics.examples, intervals={**metrics.intervals, "accuracy": interval})


def _with_macro_f1(metrics: Metrics, predicted: torch.Tensor, right: torch.Tensor) -> Metrics:
    table = confusion(right.numpy(), predicted.numpy())
    intervals = {**metrics.intervals, "macro_f1": macro_f1_interval(table)}
    return replace(metrics, macro_f1=float(macro_f1(table)), intervals=intervals)


def _batches(
    examples: Sequence[Example], model: EdgeModel, *, objective: Objective, batch_size: int
) -> Iterator[Batch]:
    """Batches with little padding: the examples ordered by their longest row."""
    by_length = sorted(examples, key=lambda example: longest_tokens(example.rows))
    pad_id = pad_id_of(model.tokenizer)
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size], pad_id=pad_id, objective=objective)
