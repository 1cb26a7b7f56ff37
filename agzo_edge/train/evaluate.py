"""How good the model is on held-out examples, with everything it has learned and no perturbation."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.loss import option_table
from agzo_edge.train.data import Batch, Example, collate, pad_id_of
from agzo_edge.train.objective import Objective, example_losses, label_scores


@dataclass(frozen=True)
class Metrics:
    """The result of one evaluation."""

    examples: int
    loss: float  # lm: mean per label token, in nats; choice: mean cross-entropy between the options
    accuracy: float | None = None  # choice: share of examples whose right option scores best

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(min(self.loss, 700.0))  # e**709 is the largest float64


@torch.no_grad()
def evaluate(model: EdgeModel, examples: Sequence[Example], *, objective: Objective, batch_size: int) -> Metrics:
    """The mean loss (and accuracy) over `examples`, in batches of like length.

    lm: weighted by label tokens, as perplexity is; choice: every example counts the same.
    """
    loss, weight, right = 0.0, 0.0, 0
    for batch in _batches(examples, model, objective=objective, batch_size=batch_size):
        on_device = batch.to(model.device)
        with model.context.running(mask=on_device.attention_mask.bool()):
            scores = label_scores(model, on_device)
        share = batch.weights * (int(batch.is_label.sum()) if objective == "lm" else len(batch.places))
        loss += float(share @ example_losses(scores, on_device, objective=objective)[0].cpu())
        weight += float(share.sum())
        if objective == "choice":
            table = option_table(-scores, on_device.example, len(batch.places))[0]
            right += int((table.argmax(-1) == on_device.answer).sum())
    accuracy = right / len(examples) if objective == "choice" else None
    return Metrics(len(examples), loss / weight, accuracy)


def _batches(
    examples: Sequence[Example], model: EdgeModel, *, objective: Objective, batch_size: int
) -> Iterator[Batch]:
    """Batches with little padding: the examples ordered by their longest row."""
    by_length = sorted(examples, key=lambda example: max(len(row.input_ids) for row in example.rows))
    pad_id = pad_id_of(model.tokenizer)
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size], pad_id=pad_id, objective=objective)
