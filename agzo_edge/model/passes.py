"""What the layers must know about the forward pass under way.

One `PassContext` is shared by all branched layers of a model. Outside a `with` block it says "plain": the
layers then compute W x + b and what was learned, and nothing else.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from agzo_edge.model.branch import Branch, InputGroup
from agzo_edge.numerics.basis import activation_basis, next_basis, projected, subspace_product
from agzo_edge.numerics.noise import Noise


class Refresh(Enum):
    """How a pass takes part in finding new bases."""

    NONE = "none"
    IN_PASS = "in_pass"  # find the basis from this pass's own inputs, and use it at once
    ACCUMULATE = "accumulate"  # add this micro-batch's part of one subspace iteration
    MEASURE = "measure"  # add this micro-batch's part of the scales


@dataclass
class Perturbation:
    """The noise of one pass, and who gets it with which sign."""

    noise_of: Callable[[Branch], Noise]
    example: Tensor  # (rows,) int64: which slice of the noise a row of one stream takes
    steps: tuple[float, ...]  # mu of each stream, with its sign: (+mu, −mu) central, (+mu, 0) forward, (1,) exact
    exact: bool = False  # carry the tangent in dual tensors instead of perturbed copies


@dataclass
class PassContext:
    """The pass under way, as the layers see it."""

    mask: Tensor | None = None  # (rows, tokens) bool: True for the tokens that bases and scales are found in
    perturbation: Perturbation | None = None
    refresh: Refresh = Refresh.NONE
    base_only: bool = False  # leave out all that was learned: the model as it was
    power_iterations: int = 3
    relative: bool = True
    kept: dict[str, list[Tensor]] | None = None  # Aᵀ x of guided layers, piece by piece; None: nobody asks
    mlp_chunk_tokens: int | None = None  # tokens of each row that an MLP works on at once; None: all
    _tokens: slice = field(default_factory=lambda: slice(None))  # those that the layers see now
    _refreshed: set[tuple[int, int | None]] = field(default_factory=set)
    _products: dict[int, Tensor] = field(default_factory=dict)
    _energies: dict[int, tuple[Branch, Tensor]] = field(default_factory=dict)  # by layer: of y and Aᵀ x, on the device
    _coordinates: tuple[weakref.ref[Tensor], Tensor, Tensor] | None = None  # the last input, its basis, and Aᵀ x

    @contextmanager
    def running(
        self,
        *,
        mask: Tensor,
        perturbation: Perturbation | None = None,
        refresh: Refresh = Refresh.NONE,
        base_only: bool = False,
    ) -> Iterator[None]:
        """Layers see this pass inside the block, and the one before after it, also after an error."""
        before = self.mask, self.perturbation, self.refresh, self.base_only
        self.mask, self.perturbation, self.refresh, self.base_only = mask, perturbation, refresh, base_only
        self._refreshed.clear()
        if refresh is Refresh.IN_PASS:
            self.forget()
        try:
            yield
            if refresh is Refresh.IN_PASS:
                self.finish_scales()
        finally:
            self.mask, self.perturbation, self.refresh, self.base_only = before
            self._coordinates = None

    @contextmanager
    def keeping_coordinates(self) -> Iterator[dict[str, list[Tensor]]]:
        """Inside, plain passes keep what the guided layers read: Aᵀ x (rows, tokens, rank) by layer, in pieces."""
        self.kept = {}
        try:
            yield self.kept
        finally:
            self.kept = None

    @contextmanager
    def seeing(self, tokens: slice) -> Iterator[None]:
        """Inside, layers are given only these tokens of each row."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = slice(None)

    @property
    def n_streams(self) -> int:
        """Copies of each row in the pass: 2 when both signs are fused."""
        if self.perturbation is None or self.perturbation.exact:
            return 1
        return len(self.perturbation.steps)

    def unperturbed(self, values: Tensor) -> Tensor:  # (streams * rows, tokens, features) -> (rows * tokens, features)
        """The values as they would be without perturbation, zero at tokens that are masked, as padding is.

        forward: the stream with step 0; central: the mean of the two signs, off by O(mu²) only. Sums over tokens
        do not see the zeros, and a GPU need not be asked how many tokens are valid.
        """
        assert self.mask is not None
        if self.n_streams == 2:
            assert self.perturbation is not None
            first, second = values.float().unflatten(0, (2, -1))
            values = second if self.perturbation.steps[1] == 0 else (first + second) / 2
        return torch.where(self.mask[:, self._tokens].unsqueeze(-1), values, 0.0).flatten(0, 1)

    def coordinates(self, group: InputGroup, inputs: Tensor) -> Tensor:  # (..., in_features) -> (..., rank)
        """Aᵀ x of every token, computed once for the layers that are given the same tensor (not with dual tensors)."""
        if self._coordinates is not None:
            known, basis, coordinates = self._coordinates
            if known() is inputs and basis is group.basis:
                return coordinates
        coordinates = projected(inputs, group.basis_in(inputs.dtype))
        self._coordinates = weakref.ref(inputs), group.basis, coordinates
        return coordinates

    def see_input(self, group: InputGroup, inputs: Tensor) -> None:
        """Let the group's basis take part in the refresh; called by each of its layers, acts on the first."""
        call = (group.index, self._tokens.start)
        if self.refresh in (Refresh.NONE, Refresh.MEASURE) or call in self._refreshed:
            return
        self._refreshed.add(call)
        tokens = self.unperturbed(inputs)
        if self.refresh is Refresh.IN_PASS:
            group.basis = activation_basis(tokens, group.basis, n_iter=self.power_iterations)
            return
        product = subspace_product(tokens, group.basis)
        if group.index in self._products:
            product += self._products[group.index]
        self._products[group.index] = product

    def see_output(self, branch: Branch, inputs: Tensor, outputs: Tensor) -> None:
        """Let the branch's scale s = rms(y) / rms|Aᵀx| take part in the refresh, and its coordinates be kept."""
        if self.kept is not None and branch.guide is not None and not self.base_only:
            self.kept.setdefault(branch.name, []).append(self.coordinates(branch.group, inputs))
        if not self.relative or self.refresh in (Refresh.NONE, Refresh.ACCUMULATE):
            return
        y = self.unperturbed(outputs).float()
        p = self.unperturbed(self.coordinates(branch.group, inputs)).float()
        energies = torch.stack([y.square().sum() / y.shape[1], p.square().sum()]).double()
        if branch.index in self._energies:
            energies += self._energies[branch.index][1]
        self._energies[branch.index] = branch, energies

    def scale_of(self, branch: Branch) -> Tensor | float:
        """The branch's scale s; in the pass that finds it a scalar on the device, so that nobody waits for it."""
        if self.refresh is not Refresh.IN_PASS or branch.index not in self._energies:
            return branch.scale
        outputs, projections = self._energies[branch.index][1]
        return torch.where(projections > 0, outputs / projections, 0.0).sqrt()

    def forget(self) -> None:
        """Drop what an interrupted refresh has left half summed."""
        self._products.clear()
        self._energies.clear()

    def finish_iteration(self, groups: list[InputGroup]) -> None:
        """One step of the subspace iteration over all micro-batches seen since the last call."""
        for group in groups:
            if group.index in self._products:
                group.basis = next_basis(self._products.pop(group.index), group.basis)

    def finish_scales(self) -> None:
        """The scales from all micro-batches seen since the last call; asks the device once for all layers."""
        if not self._energies:
            return
        branches, energies = zip(*self._energies.values(), strict=True)
        self._energies.clear()
        for branch, (outputs, projections) in zip(branches, torch.stack(energies).tolist(), strict=True):
            if math.isfinite(outputs + projections):  # else the loss will tell, and name the rows
                branch.scale = (outputs / projections) ** 0.5 if projections > 0 else 0.0
