"""The true gradient of the adapted weights, by back-propagation, and how near another direction is to it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agzo_edge.model.runtime import EdgeModel
from agzo_edge.train.data import Batch, Example, collate, pad_id_of
from agzo_edge.train.objective import label_scores

Gradient = list[Tensor]  # for each adapted layer (out_features, in_features)


def true_gradient(model: EdgeModel, batch: Batch) -> Gradient:
    """Back-propagation's gradient of the batch's loss over the adapted layers' weights."""
    weights = [layer.base.dense().requires_grad_() for layer in model.layers.values()]
    with torch.enable_grad(), model.context.running(mask=batch.attention_mask.bool()):
        loss = batch.weights @ label_scores(model, batch)[0]
        gradient = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return list(gradient)


def agreement(model: EdgeModel, batch: Batch, rows: Sequence[Example], gradient: Gradient) -> float:
    """How many rows pull one way: |sum_b w_b G_b|² / sum_b |w_b G_b|², 1 for orthogonal ones, all for equal ones."""
    pad_id = pad_id_of(model.tokenizer)
    apart = [squared_norm(true_gradient(model, collate([row], pad_id=pad_id, objective="lm"))) for row in rows]
    return squared_norm(gradient) / float(batch.weights.double().square() @ torch.tensor(apart, dtype=torch.float64))


def cosine_of(parts: Sequence[tuple[Tensor, Tensor]], gradient: Gradient) -> float:
    """The cosine between an estimate, given by each layer's (E, true gradient in E's coordinates), and `gradient`."""
    inner = sum(float((estimate.double() * true).sum()) for estimate, true in parts)
    size = math.sqrt(sum(float(estimate.double().square().sum()) for estimate, _ in parts))
    norm = math.sqrt(squared_norm(gradient))
    return inner / (size * norm) if size > 0 else 0.0


def squared_norm(tensors: Sequence[Tensor]) -> float:
    """The sum of all squares, in float64."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors)
