"""Finding what the noise of a window spans on the side of the layers' outputs: errors at the head, sent straight back.

The gradient of a layer that writes to the residual stream is Qᵀ H, Q the loss's gradient at what it puts out. That
would take a backward pass; but a residual stream passes a gradient on as it is beside what its blocks add, so Q is
near the gradient at the stream's end, which needs only the last norm and the head. From it and from the layer's own
coordinates Aᵀx each example gets a guess at its part of dL/dC, and the guesses' leading directions are the guide.
The noise is drawn inside it, so what is learned is still measured, by differences of losses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from agzo_edge.model.passes import Refresh
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.basis import output_basis
from agzo_edge.train.data import Batch
from agzo_edge.train.objective import Goal


def find_guides(model: EdgeModel, batches: Sequence[Batch], goal: Goal, *, refresh: Refresh) -> None:
    """Give the layers that write to the residual stream the guides of a batch, by one plain pass over it.

    The pass may be the one that finds the bases.
    """
    guided = [branch for branch in model.branches if branch.guide is not None]
    parts = [_guesses(model, batch.to(model.device), goal, refresh=refresh) for batch in batches]
    for branch in guided:
        assert branch.guide is not None
        branch.guide = output_basis(torch.cat([part[branch.name] for part in parts]), branch.guide)


def _guesses(
    model: EdgeModel, batch: Batch, goal: Goal, *, refresh: Refresh
) -> dict[str, Tensor]:  # (examples, out_features, rank) by layer
    """Each example's guess at its part of the gradient of C."""
    with (
        torch.enable_grad(),  # no weight asks for a gradient: the graph begins at the stream's end
        model.context.running(mask=batch.attention_mask.bool(), refresh=refresh),
        model.context.keeping_coordinates() as coordinates,
        _stream_ends(model) as ends,
    ):
        loss = batch.weights @ goal.losses(model, batch)[0]
        (error,) = torch.autograd.grad(loss, ends[-1])  # (rows, tokens, hidden_size); dpo's reference ran before
    error = error.float().mT
    guesses = {}
    for name, pieces in coordinates.items():
        by_row = error @ torch.cat(pieces, dim=1).float()  # (rows, hidden_size, rank)
        by_example = by_row.new_zeros(batch.answer.shape[0], *by_row.shape[1:])
        guesses[name] = by_example.index_add(0, batch.example, by_row)
    return guesses


@contextmanager
def _stream_ends(model: EdgeModel) -> Iterator[list[Tensor]]:
    """Inside, what enters the model's last norm is kept, and a gradient goes back to it and no further."""
    assert model.last_module is not None  # as `require_guidable` has seen to
    ends: list[Tensor] = []

    def cut(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ends.append(args[0].detach().requires_grad_())
        return (ends[-1], *args[1:])

    hook = model.last_module.register_forward_pre_hook(cut)
    try:
        yield ends
    finally:
        hook.remove()
