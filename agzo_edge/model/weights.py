"""The frozen weight of a linear layer, in the forms it is stored in.

We never call bitsandbytes' modules: their CPU forward repacks the 4-bit weight to bfloat16 in place, and
their 8-bit forward quantizes the activations, which drowns a finite difference (docs/decisions/0001).
A weight is dequantized into the workspace and used by one matmul; what is stored is only ever read.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from agzo_edge.config import RunConfig
from agzo_edge.errors import ModelError
from agzo_edge.model.four_bit import FourBitWeight
from agzo_edge.model.workspace import Workspace
from agzo_edge.numerics.update import stochastically_rounded
from agzo_edge.writers import is_beside_text, is_in_state_space


class BaseWeight(Protocol):
    """A stored weight that can be read as a dense (out_features, in_features) matrix."""

    shape: tuple[int, int]

    @property
    def kind(self) -> str:
        """How it is stored: nf4, fp4, int8 or none."""
        ...

    def dense(self) -> Tensor:
        """The weight (out_features, in_features) in the compute dtype; valid until any other's is asked for."""
        ...

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors by name, for hashing and counting."""
        ...

    def movable(self) -> tuple[Tensor, ...]:
        """The stored tensors that may be elsewhere."""
        ...

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same weight with these tensors in the place of the movable ones."""
        ...


class DenseWeight:
    """A weight in 16 or 32 bit. `transposed` is the (in, out) layout of GPT-2's Conv1D."""

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        self.weight = weight.mT if transposed else weight
        self.shape = (self.weight.shape[0], self.weight.shape[1])

    @property
    def kind(self) -> str:
        """How it is stored."""
        return "none"

    def dense(self) -> Tensor:
        """The weight itself, not a copy."""
        return self.weight

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The one tensor."""
        yield "weight", self.weight

    def movable(self) -> tuple[Tensor, ...]:
        """The one tensor."""
        return (self.weight,)

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same weight elsewhere."""
        return type(self)(*tensors)


class HeldWeight:
    """A weight held dequantized, which a window's change is written into (target = dequantized).

    Kept in bfloat16 or float32: float16 has too few bits for what a window adds, and its range too.
    The stored form stays beside it, so that the change can be told at the end.
    """

    def __init__(self, origin: BaseWeight, *, dtype: torch.dtype) -> None:
        self.origin = origin
        self.dtype = dtype
        self.shape = origin.shape
        kept = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
        self.weight = origin.dense().to(kept, copy=True)

    @property
    def kind(self) -> str:
        """How it is stored."""
        return self.origin.kind

    def dense(self) -> Tensor:
        """The weight in the compute dtype."""
        return self.weight.to(self.dtype)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """What it was dequantized from, which stays as it is."""
        return self.origin.stored()

    def movable(self) -> tuple[Tensor, ...]:
        """What it was dequantized from: the weight is written to and stays."""
        return self.origin.movable()

    def with_tensors(self, *tensors: Tensor) -> Self:
        """Itself, with what it was dequantized from elsewhere."""
        self.origin = self.origin.with_tensors(*tensors)
        return self

    def add_(self, change: Tensor, random_bits: Callable[[], Tensor]) -> None:
        """Add a float32 change (out_features, in_features); stochastic rounding keeps small ones in bfloat16."""
        if self.weight.dtype is torch.bfloat16:
            self.weight.copy_(stochastically_rounded(self.weight.float() + change, random_bits=random_bits()))
        else:
            self.weight += change

    def change(self) -> Tensor:
        """What was added since the start, (out_features, in_features) float32."""
        return self.weight.float() - self.origin.dense().float()


class EightBitWeight:
    """A bitsandbytes int8 weight: each row scaled to ±127. The activations stay unquantized."""

    def __init__(self, rows: Tensor, row_absmax: Tensor, *, dtype: torch.dtype, workspace: Workspace) -> None:
        self.rows = rows
        self.row_absmax = row_absmax
        self.dtype = dtype
        self.workspace = workspace
        self.shape = (rows.shape[0], rows.shape[1])
        workspace.expect(self.shape, dtype)

    @property
    def kind(self) -> str:
        """How it is stored."""
        return "int8"

    def dense(self) -> Tensor:
        """The dequantized weight, in the workspace."""
        scale = (self.row_absmax.float() / 127.0).to(self.dtype).unsqueeze(-1)
        weight = self.workspace.tensor(self.shape, dtype=self.dtype, device=self.rows.device)
        return torch.mul(self.rows, scale, out=weight)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The integers and the rows' scales."""
        yield "rows", self.rows
        yield "row_absmax", self.row_absmax

    def movable(self) -> tuple[Tensor, ...]:
        """The integers and the rows' scales."""
        return self.rows, self.row_absmax

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same weight elsewhere."""
        return type(self)(*tensors, dtype=self.dtype, workspace=self.workspace)


def rehoused(weight: BaseWeight, place: Callable[[Tensor], Tensor]) -> Any:
    """The same weight, each of its movable tensors where `place` puts it."""
    return weight.with_tensors(*map(place, weight.movable()))


def quantized(
    weight: BaseWeight, config: RunConfig, *, device: torch.device, dtype: torch.dtype, workspace: Workspace
) -> BaseWeight:
    """A dense weight in the width that `config` asks for, on `device`; one that is quantized already as it is.

    The bytes are those of bitsandbytes' own layers: a weight is rounded to the compute dtype first, for
    8 bit to float16.
    """
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    if isinstance(weight, FourBitWeight):
        weight.state.to(device)  # the code book and nested scales too
    if not isinstance(weight, DenseWeight):
        return rehoused(weight, lambda tensor: tensor.to(device))
    if config.load_in_8bit:
        rows, row_absmax, _ = int8_vectorwise_quant(weight.dense().to(device, torch.float16).contiguous())
        return EightBitWeight(rows, row_absmax, dtype=dtype, workspace=workspace)
    values = weight.dense().to(device, dtype)
    if config.load_in_4bit:
        packed, state = quantize_4bit(
            values.contiguous(), quant_type=config.quant_type, compress_statistics=config.double_quant
        )
        return FourBitWeight(packed, state, dtype=dtype, workspace=workspace)
    return DenseWeight(values)


def base_weight_of(
    module: nn.Module, *, name: str, dtype: torch.dtype, workspace: Workspace | None = None
) -> BaseWeight:
    """The frozen weight of `module`, a linear layer of torch, transformers or bitsandbytes.

    A quantized one is dequantized into `workspace`, or into one of its own. Raises ModelError for a layer whose
    kind is not known, by name.
    """
    workspace = workspace or Workspace()
    kind = type(module).__name__
    weight: Any = module.weight
    if kind == "Linear4bit":
        if weight.quant_state is None:
            raise ModelError(f"{name}: the 4-bit layer carries no quantization state; is the checkpoint whole?")
        return FourBitWeight(weight.data, weight.quant_state, dtype=dtype, workspace=workspace)
    if kind == "Linear8bitLt":
        rows = weight.CB if weight.CB is not None else weight.data
        row_absmax = weight.SCB
        if row_absmax is None or rows.dtype is not torch.int8:
            raise ModelError(f"{name}: the 8-bit layer carries no row scales; is the checkpoint whole?")
        return EightBitWeight(rows, row_absmax, dtype=dtype, workspace=workspace)
    if kind == "Conv1D":
        return DenseWeight(weight.data, transposed=True)
    if isinstance(module, nn.Linear):
        return DenseWeight(weight.data)
    raise ModelError(f"{name}: a {kind} is no linear layer that AGZO can adapt")


def linear_layers(network: nn.Module) -> dict[str, Any]:
    """The layers that base weights are made of, by path: all linear ones that text passes but state-space mixers'."""
    linear = {name: module for name, module in network.named_modules() if is_linear(module)}
    return {name: module for name, module in linear.items() if not is_in_state_space(name) and not is_beside_text(name)}


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of a kind that `base_weight_of` reads."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
