"""Finding the direction of a window's noise: errors at the head, sent straight back.

The gradient of a layer that writes to the residual stream is Qᵀ H, Q the loss's gradient at what it puts out. That
would take a backward pass; but a residual stream passes a gradient on as it is beside what its blocks add, so Q is
near the gradient at the stream's end, which needs only the last norm and the head. With the layer's own coordinates
Aᵀx it gives a guess at dL/dC, whose direction is the guide. The noise goes to and fro along it, so whether and how far
to go is measured, layer by layer, by differences of losses through the whole model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from agzo_edge.model.branch import Branch
from agzo_edge.model.passes import Refresh
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.noise import evened, next_guide
from agzo_edge.numerics.update import reprojected
from agzo_edge.train.data import Batch
from agzo_edge.train.objective import Goal

GUIDES_AT_ONCE = 8  # a batch of them takes some six times its own size for a moment


def find_guides(
    model: EdgeModel,
    batches: Sequence[Batch],
    goal: Goal,
    *,
    memory: float,
    old_bases: Mapping[int, Tensor],  # by input group: those of the guides so far
    refresh: Refresh,
) -> None:
    """Give the layers that write to the residual stream the guides of a batch, by one plain pass over it.

    The pass may be the one that finds the bases.
    """
    parts = [_guesses(model, batch.to(model.device), goal, refresh=refresh) for batch in batches]
    for alike in _alike(model.branches):
        names = [branch.name for branch in alike]
        guesses, energies = (
            reduce(torch.add, [torch.stack([part[name][i] for name in names]) for part in parts]) for i in range(2)
        )
        before = torch.stack([_in_present_basis(branch, old_bases) for branch in alike])
        for branch, guide in zip(alike, next_guide(evened(guesses, energies), before, memory=memory), strict=True):
            branch.guide = guide


def _alike(branches: Sequence[Branch]) -> Iterator[list[Branch]]:
    """The guided branches of one shape, some at a time: what is done with all of them is one launch on a GPU."""
    by_shape: dict[torch.Size, list[Branch]] = {}
    for branch in branches:
        if branch.guide is not None:
            by_shape.setdefault(branch.guide.shape, []).append(branch)
    for alike in by_shape.values():
        yield from (alike[i : i + GUIDES_AT_ONCE] for i in range(0, len(alike), GUIDES_AT_ONCE))


def _in_present_basis(branch: Branch, old_bases: Mapping[int, Tensor]) -> Tensor:  # (out_features, rank)
    """The guide that the window before had."""
    assert branch.guide is not None
    return reprojected(branch.guide, old_bases[branch.group.index], branch.group.basis)


def _guesses(
    model: EdgeModel, batch: Batch, goal: Goal, *, refresh: Refresh
) -> dict[str, tuple[Tensor, Tensor]]:  # by layer: (out_features, rank) and (rank,), float32
    """A guess at the batch's part of the gradient of each C, and the energies of the coordinates that it is made of.

    The pass may find bases, in the tokens that predict a label.
    """
    with (
        torch.enable_grad(),  # no weight asks for a gradient: the graph begins at the stream's end
        model.context.running(mask=batch.is_predicting, refresh=refresh),
        model.context.keeping_coordinates() as coordinates,
        _stream_ends(model) as ends,
    ):
        loss = batch.weights @ goal.losses(model, batch)[0]
        (error,) = torch.autograd.grad(loss, ends[-1])  # (rows, tokens, hidden_size); dpo's reference ran before
    error, is_predicting = error.float().flatten(0, 1).mT, batch.is_predicting.flatten().float()

    def guessed(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
        tokens = torch.cat(pieces, dim=1).float().flatten(0, 1)
        return error @ tokens, is_predicting @ tokens.square()

    return {name: guessed(pieces) for name, pieces in coordinates.items()}


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
