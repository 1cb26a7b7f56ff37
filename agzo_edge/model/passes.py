"""What the layers must know about the forward pass under way.

One `PassContext` is shared by all branched layers of a model. Outside a `with` block it says "plain": the
layers then compute W x + b and what was learned, and nothing else.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from agzo_edge.model.branch import Branch, InputGroup
from agzo_edge.numerics.basis import activation_basis, next_basis, subspace_product


class Refresh(Enum):
    """How a pass takes part in finding new bases."""

    NONE = "none"
    IN_PASS = "in_pass"  # find the basis from this pass's own inputs, and use it at once
    ACCUMULATE = "accumulate"  # add this micro-batch's part of one subspace iteration
    MEASURE = "measure"  # add this micro-batch's part of the scales


@dataclass
class Perturbation:
    """The noise of one pass, and who gets it with which sign."""

    noise_of: Callable[[Branch], Tensor]  # (examples, out_features, rank) in the compute dtype
    example: Tensor  # (rows,) int64: which slice of the noise a row of one stream takes
    steps: tuple[float, ...]  # s·mu of each stream: (+mu, −mu) central, (+mu, 0) forward
    exact: bool = False  # carry the tangent in dual tensors instead of perturbed copies


@dataclass
class PassContext:
    """The pass under way, as the layers see it."""

    mask: Tensor | None = None  # (rows, tokens) bool: True where a token is no padding
    perturbation: Perturbation | None = None
    refresh: Refresh = Refresh.NONE
    base_only: bool = False  # leave out all that was learned: the model as it was
    power_iterations: int = 3
    relative: bool = True
    mlp_chunk_tokens: int | None = None  # tokens of each row that an MLP works on at once; None: all
    _tokens: slice = field(default_factory=lambda: slice(None))  # those that the layers see now
    _refreshed: set[tuple[int, int | None]] = field(default_factory=set)
    _products: dict[int, Tensor] = field(default_factory=dict)
    _energies: dict[str, list[Tensor]] = field(default_factory=dict)

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
        try:
            yield
        finally:
            self.mask, self.perturbation, self.refresh, self.base_only = before

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

    def unperturbed(self, values: Tensor) -> Tensor:  # (streams * rows, tokens, features)
        """The valid tokens' (tokens, features) as they would be without perturbation.

        forward: the stream with step 0; central: the mean of the two signs, off by O(mu²) only.
        """
        assert self.mask is not None
        if self.n_streams == 2:
            assert self.perturbation is not None
            first, second = values.float().unflatten(0, (2, -1))
            values = second if self.perturbation.steps[1] == 0 else (first + second) / 2
        return values[self.mask[:, self._tokens]]

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
        self._products[group.index] = self._products.get(group.index, torch.zeros_like(product)) + product

    def see_output(self, branch: Branch, inputs: Tensor, outputs: Tensor) -> None:
        """Let the branch's scale s = rms(y) / rms|Aᵀx| take part in the refresh."""
        if not self.relative or self.refresh in (Refresh.NONE, Refresh.ACCUMULATE):
            return
        y = self.unperturbed(outputs).float()
        p = self.unperturbed(inputs).float() @ branch.group.basis
        parts = torch.stack([y.square().sum() / y.shape[1], p.square().sum()]).double()
        self._energies.setdefault(branch.name, []).append(parts)
        if self.refresh is Refresh.IN_PASS:
            self.finish_scales([branch])

    def forget(self) -> None:
        """Drop what an interrupted refresh has left half summed."""
        self._products.clear()
        self._energies.clear()

    def finish_iteration(self, groups: list[InputGroup]) -> None:
        """One step of the subspace iteration over all micro-batches seen since the last call."""
        for group in groups:
            if group.index in self._products:
                group.basis = next_basis(self._products.pop(group.index), group.basis)

    def finish_scales(self, branches: list[Branch]) -> None:
        """The branches' scales from all micro-batches seen since the last call."""
        for branch in branches:
            if branch.name in self._energies:
                outputs, projections = torch.stack(self._energies.pop(branch.name)).sum(0).tolist()
                if math.isfinite(outputs + projections):  # else the loss will tell, and name the rows
                    branch.scale = (outputs / projections) ** 0.5 if projections > 0 else 0.0
