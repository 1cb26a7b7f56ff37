"""The side-branch of a linear layer: everything AGZO learns, and nothing of the base.

    y = W x + b + C_acc (A_accᵀ x) + C (Aᵀ x) ± mu s R_b (Aᵀ x)
        frozen    folded windows     window    perturbation

A branch is plain tensors, so replay can rebuild an adapter without a model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from agzo_edge.errors import AdapterError, numbered
from agzo_edge.model.device import sent
from agzo_edge.model.weights import HeldWeight
from agzo_edge.numerics.basis import activation_basis, starting_basis
from agzo_edge.numerics.lowrank import LowRank, compressed, zero_lowrank
from agzo_edge.numerics.noise import Noise, NoiseKind, draw_noise, guided_noise
from agzo_edge.numerics.products import whole_widths
from agzo_edge.writers import writes_to_residual

EXTRACTION_STEPS = 12  # of subspace iteration: a trained change's spectrum falls fast, six already do (tested)


@dataclass
class InputGroup:
    """Layers that read the same input (q, k, v; gate, up), and so share one basis."""

    index: int
    in_features: int
    basis: Tensor  # (in_features, rank) float32, orthonormal columns
    _cast: tuple[Tensor, Tensor] | None = None  # the basis, and what `basis_in` made of it

    @property
    def rank(self) -> int:
        """Directions in the basis."""
        return self.basis.shape[1]

    def basis_in(self, dtype: torch.dtype) -> Tensor:
        """The basis in `dtype` for the forward, kept until it changes."""
        if self._cast is None or self._cast[0] is not self.basis or self._cast[1].dtype is not dtype:
            self._cast = self.basis, self.basis.to(dtype)
        return self._cast[1]


@dataclass
class Branch:
    """The learned state of one layer."""

    name: str  # the module's path in the transformers model
    index: int  # the layer's number in the noise's key
    group: InputGroup
    out_features: int
    folded: LowRank  # sum of the past windows, at most adapter_rank after compression
    c: Tensor  # (out_features, rank) float32: this window's coefficients
    moments: list[Tensor] = field(default_factory=list)  # the optimizer's state, shaped like c
    guide: Tensor | None = None  # D (out_features, rank) float32: the noise is e_b D; None for all directions
    scale: float = 1.0  # s: rms of y over rms length of Aᵀx; 1 when perturbations are absolute
    steps_in_window: int = 0  # updates that c holds; 0 says that c is zero
    held: HeldWeight | None = None  # the weight that windows are written into, when it is held dequantized
    _cast: tuple[LowRank, LowRank] | None = None  # the folded sum, and what `folded_in` made of it

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer."""
        return self.out_features, self.group.in_features

    def noise(self, kind: NoiseKind, n_examples: int, **key: int) -> Noise:
        """R of consecutive examples; `key`: seed, step, first_example. Full noise is where C is."""
        key["layer"] = self.index
        if self.guide is not None:
            return guided_noise(kind, n_examples, self.guide, **key)
        return draw_noise(kind, (n_examples, *self.c.shape), **key).placed(partial(sent, device=self.c.device))

    def learned(self) -> LowRank:
        """The weight change so far: the folded windows and the present one."""
        return self.folded.plus(LowRank(self.c, self.group.basis))

    def result(self, rank: int) -> LowRank:
        """The weight change so far at no more than `rank`: from the held weight, its leading directions."""
        if self.held is None:
            return compressed(self.learned(), rank)[0]
        change = self.held.change() + self.learned().dense()
        rank = min(rank, *self.shape)
        basis = activation_basis(change, starting_basis(self.shape[1], rank).to(change.device), n_iter=EXTRACTION_STEPS)
        return LowRank(change @ basis, basis)

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was learned yet, or all of it went into the held weight."""
        return self.folded.rank == 0 and self.steps_in_window == 0

    @property
    def window(self) -> Tensor | None:
        """This window's coefficients (out_features, rank) float32; None while they are zero."""
        return self.c if self.steps_in_window else None

    def folded_in(self, dtype: torch.dtype) -> LowRank | None:
        """The folded windows in `dtype` for the forward, kept until they change; None while there are none."""
        if self.folded.rank == 0:
            return None
        if self._cast is None or self._cast[0] is not self.folded or self._cast[1].c.dtype is not dtype:
            cast = (whole_widths(part.to(dtype)) for part in (self.folded.c, self.folded.a))
            self._cast = self.folded, LowRank(*cast)
        return self._cast[1]

    def fold(self, *, keep_rank: int, random_bits: Callable[[], Tensor]) -> float:
        """Move the window into the folded sum, or into the held weight; the energy that a compression left out.

        The sum is compressed only when it is twice as wide as it may stay: the SVD is then rare.
        """
        if self.steps_in_window:
            if self.held is None:
                self.folded = self.learned()
            else:
                self.held.add_(LowRank(self.c, self.group.basis).dense(), random_bits)
            self.c = torch.zeros_like(self.c)
            self.steps_in_window = 0
        if self.folded.rank <= 2 * keep_rank:
            return 0.0
        self.folded, left_out = compressed(self.folded, keep_rank)
        return left_out


def make_branches(
    layers: Sequence[tuple[str, int, int]],  # name, out_features, index of its input group
    group_in_features: Sequence[int],
    *,
    rank: int,
    guided: bool = False,  # whether the noise of layers that write to the residual stream follows a guide
    device: torch.device | str = "cpu",
) -> list[Branch]:
    """Untouched branches for `layers`; a group narrower than `rank` gets as many directions as it has."""

    groups = [
        InputGroup(index, width, starting_basis(width, min(rank, width)).to(device))
        for index, width in enumerate(group_in_features)
    ]
    branches = []
    for index, (name, out_features, group) in enumerate(layers):
        c = torch.zeros(out_features, groups[group].rank, device=device)
        branches.append(
            Branch(
                name=name,
                index=index,
                group=groups[group],
                out_features=out_features,
                folded=zero_lowrank(out_features, groups[group].in_features, device=device),
                c=c,
                guide=torch.zeros_like(c) if guided and writes_to_residual(name) else None,
            )
        )
    return branches


@contextmanager
def cut_to(branches: Sequence[Branch], rank: int) -> Iterator[None]:
    """Inside, the layers change by what an adapter of `rank` holds of what they have learned; then all of it is back.

    Weights that are held dequantized stay: they are a result themselves.
    """
    before = [(branch.folded, branch.c, branch.steps_in_window) for branch in branches]
    try:
        for branch in branches:
            if branch.held is None and branch.folded.rank + branch.c.shape[1] > rank:
                branch.folded, branch.c, branch.steps_in_window = branch.result(rank), torch.zeros_like(branch.c), 0
        yield
    finally:
        for branch, (folded, c, steps_in_window) in zip(branches, before, strict=True):
            branch.folded, branch.c, branch.steps_in_window = folded, c, steps_in_window


def set_learned(branches: Sequence[Branch], changes: Mapping[str, LowRank]) -> None:
    """Let the branches begin with these weight changes, by layer name.

    Raises AdapterError for a layer that is not there or has another shape.
    """
    by_name = {branch.name: branch for branch in branches}
    faults = [f"{name}: the model has no such layer to train" for name in changes if name not in by_name]
    for name, change in changes.items():
        shape = (change.c.shape[0], change.a.shape[0])
        if name in by_name and shape != by_name[name].shape:
            faults.append(f"{name}: is {shape} in the adapter and {by_name[name].shape} in the model")
    if faults:
        raise AdapterError("the adapter does not fit the model:\n" + numbered(faults, shown=5))
    for name, change in changes.items():
        device = by_name[name].c.device
        c, a = (part.to(device).float().contiguous() for part in (change.c, change.a))  # as a checkpoint gives them
        by_name[name].folded = LowRank(c, a)
