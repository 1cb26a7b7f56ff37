"""MLPs that work on a part of the tokens at a time: their wide activations are then that much smaller."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from agzo_edge.budget.facts import MLP_MODULES
from agzo_edge.model.passes import PassContext


def let_mlps_work_in_pieces(network: nn.Module, context: PassContext) -> None:
    """Let each block's MLP take `context.mlp_chunk_tokens` of a row's tokens at a time, where that is set.

    An MLP is found by its name; OPT, whose block holds the two layers itself, has none, and works as before.
    """
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in MLP_MODULES:
            module.forward = _in_pieces(module.forward, context)  # this module's alone


def _in_pieces(forward: Callable[..., Any], context: PassContext) -> Callable[..., Any]:
    def forward_in_pieces(x: Tensor, *args: Any, **kwargs: Any) -> Any:  # (rows, tokens, hidden)
        size = context.mlp_chunk_tokens
        if not size or x.ndim != 3 or x.shape[1] <= size:
            return forward(x, *args, **kwargs)
        pieces = []
        for start in range(0, x.shape[1], size):
            tokens = slice(start, start + size)
            some = [_some(each, tokens, of=x) for each in (x, *args)]  # BLOOM's MLP is given the stream as well
            with context.seeing(tokens):
                pieces.append(forward(*some, **kwargs))
            if not isinstance(pieces[-1], Tensor):  # GPT-OSS's puts out its routing as well: it stays whole
                return forward(x, *args, **kwargs)
        return torch.cat(pieces, dim=1)

    return forward_in_pieces


def _some(argument: Any, tokens: slice, *, of: Tensor) -> Any:
    """These tokens of an argument that has as many as `of`; in one piece, as routed experts flatten it."""
    has_tokens = isinstance(argument, Tensor) and argument.shape[:2] == of.shape[:2]
    return argument[:, tokens].contiguous() if has_tokens else argument
