"""From a batch to the loss of each example: the one place where training runs the model."""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from agzo_edge.data_config import Objective
from agzo_edge.model.attention import exact_attention
from agzo_edge.model.memory import trim_heap
from agzo_edge.model.passes import Perturbation, Refresh
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.loss import choice_losses, label_losses, option_table, row_sums
from agzo_edge.train.data import Batch


@dataclass(frozen=True)
class Outcome:
    """What an evaluation learns of a batch, without perturbation."""

    losses: Tensor  # (examples,) float32
    predicted: Tensor | None = None  # (examples,) int64: the row that the model prefers, where there are several


class Goal(ABC):
    """What is learned."""

    @abstractmethod
    def losses(self, model: EdgeModel, batch: Batch) -> Tensor:
        """The loss of each example in each stream of the pass under way: (streams, examples) float32."""

    @abstractmethod
    def outcome(self, model: EdgeModel, batch: Batch) -> Outcome:
        """What an evaluation asks for, in a plain pass."""

    def at(self, _step: int, /) -> "Goal":
        """The goal of a step: one that draws random numbers draws that step's."""
        return self

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Let go of what the goal holds."""


class LmGoal(Goal):
    """The mean negative log-likelihood of the label tokens; an example is its row."""

    def losses(self, model: EdgeModel, batch: Batch) -> Tensor:
        """(streams, examples) float32."""
        return label_scores(model, batch)

    def outcome(self, model: EdgeModel, batch: Batch) -> Outcome:
        """The losses alone: nothing is chosen."""
        return Outcome(label_scores(model, batch)[0])


class ChoiceGoal(Goal):
    """The cross-entropy between the options' mean log-likelihoods per token."""

    def losses(self, model: EdgeModel, batch: Batch) -> Tensor:
        """(streams, examples) float32."""
        return choice_losses(self._table(model, batch), batch.answer)

    def outcome(self, model: EdgeModel, batch: Batch) -> Outcome:
        """The losses, and the option that scores best."""
        table = self._table(model, batch)
        return Outcome(choice_losses(table, batch.answer)[0], table[0].argmax(-1))

    @staticmethod
    def _table(model: EdgeModel, batch: Batch) -> Tensor:  # (streams, examples, options)
        return option_table(-label_scores(model, batch), batch.example, batch.option, batch.options_shape)


GOALS: dict[Objective, Goal] = {"lm": LmGoal(), "choice": ChoiceGoal()}  # those without settings


@torch.no_grad()
def loss_of(
    model: EdgeModel,
    batch: Batch,
    *,
    goal: Goal,
    perturbation: Perturbation | None = None,
    refresh: Refresh = Refresh.NONE,
) -> Tensor:  # (streams, examples) float32
    """The loss of each example, once for each stream of the pass, or (loss, derivative) in exact mode.

    All streams go through the model as one batch of streams * rows rows: every weight is read and
    dequantized once, and both signs meet the same kernels.
    """
    exact = perturbation is not None and perturbation.exact
    with (
        model.context.running(mask=batch.attention_mask.bool(), perturbation=perturbation, refresh=refresh),
        exact_attention(exact),
        forward_ad.dual_level() if exact else nullcontext(),  # within it each layer's look for a tangent takes time
    ):
        losses = goal.losses(model, batch)
        if not exact:
            return losses
        primal, tangent = forward_ad.unpack_dual(losses)
        return torch.cat([primal, torch.zeros_like(primal) if tangent is None else tangent])


@torch.no_grad()
def run_layers(
    model: EdgeModel,
    batch: Batch,
    *,
    mask: Tensor,  # (rows, tokens) bool: the tokens that bases and scales are found in
    refresh: Refresh,
) -> None:
    """Let the layers see a batch, for the bases that they find in it; nothing is scored."""
    with model.context.running(mask=mask, refresh=refresh):
        model.hidden_states(batch.input_ids)


def label_scores(model: EdgeModel, batch: Batch) -> Tensor:  # (streams, rows) float32
    """The mean negative log-likelihood of each row's label tokens."""
    return label_sums(model, batch) / batch.is_label.sum(1)


def label_sums(model: EdgeModel, batch: Batch) -> Tensor:  # (streams, rows) float32
    """The negative log-likelihood of each row's label tokens together."""
    streams = model.context.n_streams
    row, token = batch.predicts
    hidden = model.hidden_states(batch.input_ids.repeat(streams, 1))
    hidden = hidden.unflatten(0, (streams, -1))[:, row, token]
    labels = batch.input_ids[row, token + 1]
    if hidden.device.type == "cpu":
        trim_heap()
    losses = label_losses(hidden, labels, model.head_parts(), chunk_bytes=model.logits_chunk_bytes)
    return row_sums(losses, row, token, (batch.input_ids.shape[0], batch.input_ids.shape[1]))
