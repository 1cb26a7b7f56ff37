"""From a batch to the loss of each example: the one place where training runs the model."""

from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from agzo_edge.model.device import exact_attention
from agzo_edge.model.passes import Perturbation, Refresh
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.loss import choice_losses, label_losses, option_table, row_sums
from agzo_edge.train.data import Batch

Objective = Literal["lm", "choice"]


@torch.no_grad()
def loss_of(
    model: EdgeModel,
    batch: Batch,
    *,
    objective: Objective,
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
        forward_ad.dual_level(),
    ):
        losses = example_losses(label_scores(model, batch), batch, objective=objective)
        if not exact:
            return losses
        primal, tangent = forward_ad.unpack_dual(losses)
        return torch.cat([primal, torch.zeros_like(primal) if tangent is None else tangent])


def label_scores(model: EdgeModel, batch: Batch) -> Tensor:  # (streams, rows) float32
    """The mean negative log-likelihood of each row's label tokens."""
    streams = model.context.n_streams
    hidden = model.hidden_states(batch.input_ids.repeat(streams, 1), batch.attention_mask.repeat(streams, 1))
    row, token = batch.is_label[:, 1:].nonzero(as_tuple=True)  # the state at t predicts the token at t + 1
    hidden = hidden.unflatten(0, (streams, -1))[:, row, token]
    labels = batch.input_ids[row, token + 1]
    losses = label_losses(hidden, labels, model.head_parts(), chunk_bytes=model.logits_chunk_bytes)
    n_rows = batch.input_ids.shape[0]
    return row_sums(losses, row, n_rows) / torch.bincount(row, minlength=n_rows)


def example_losses(scores: Tensor, batch: Batch, *, objective: Objective) -> Tensor:
    """From rows' scores (streams, rows) to examples' losses (streams, examples).

    lm: an example is its row. choice: the cross-entropy between the options' mean log-likelihoods per token.
    """
    if objective == "lm":
        return scores
    return choice_losses(option_table(-scores, batch.example, batch.answer.shape[0]), batch.answer)
