"""A loaded model as the rest of the program sees it: hidden states, logits, branches."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from agzo_edge.errors import ModelError
from agzo_edge.model.attention import unpacked_rows
from agzo_edge.model.branch import Branch, InputGroup, make_branches
from agzo_edge.model.linear import BranchedLinear, FrozenLinear
from agzo_edge.model.memory import is_out_of_memory
from agzo_edge.model.passes import PassContext, Refresh
from agzo_edge.model.weights import HeldWeight
from agzo_edge.units import MIB

PROBE_TOKENS = 6  # enough for every operation to run; small enough to cost nothing


@dataclass
class EdgeModel:
    """A causal language model whose linear layers are frozen and carry side-branches."""

    network: Any  # the transformers model
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    context: PassContext
    source: str  # the directory or hub id it came from
    branches: list[Branch]
    last_module: nn.Module | None = None  # the one that puts the hidden states out: the last norm
    transposed: bool = False  # its layers are GPT-2's Conv1D, whose weights are stored (in, out)
    logits_chunk_bytes: int = 64 * MIB  # float32 logits that exist at once
    offloaded: str = "none"  # what waits outside the device: none, embeddings or layers
    host_hooks: list[Any] = field(default_factory=list)  # on embeddings that wait on the host

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, hidden_size): what the head turns into logits.

        Rows are padded at their end, which no token before it sees: attention needs no mask but its own causality,
        and so its fastest kernel can be taken. What comes out at the padding means nothing.
        """
        with unpacked_rows():
            output = self.network.base_model(input_ids=input_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocabulary) logits, with the caps and scales that the model defines."""
        return self._through(self.head, hidden)

    def head_parts(self) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
        """The head in parts of the vocabulary, each with its words: one part, unless it waits on the host."""
        for words, part in self.head.parts():
            yield words, partial(self._through, part)

    def _through(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """The logits of a head, or of a part of it: caps and scales know no neighbouring words."""
        logits = head(hidden)
        if scale := getattr(self._text_config, "logit_scale", None):
            logits = logits * scale
        if scaling := getattr(self._text_config, "logits_scaling", None):
            logits = logits / scaling
        if cap := getattr(self._text_config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @cached_property
    def _text_config(self) -> Any:
        """transformers' configuration of the model of text, found once: it is asked with every chunk of logits."""
        return self.network.config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        return self.head.out_features

    @property
    def quantization(self) -> str:
        """How the trained layers are stored: nf4, fp4, int8 or none."""
        return next(iter(self.layers.values())).base.kind

    @property
    def positions(self) -> int | None:
        """Tokens in the longest row that the model was made for, where it says so."""
        return getattr(self._text_config, "max_position_embeddings", None)

    def require_positions(self, longest_tokens: int) -> None:
        """Raise ModelError for a row that is longer than the model's positions."""
        if self.positions is not None and longest_tokens > self.positions:
            raise ModelError(
                f"{self.source}: the longest row has {longest_tokens:,} tokens, and the model {self.positions:,} "
                f"positions: use --max-seq-length {self.positions} with --overlong truncate or drop"
            )

    @property
    def groups(self) -> list[InputGroup]:
        """The input groups, in order."""
        return sorted({branch.group.index: branch.group for branch in self.branches}.values(), key=lambda g: g.index)

    @property
    def head(self) -> FrozenLinear:
        """The layer that turns hidden states into logits."""
        head: FrozenLinear = self.network.get_output_embeddings()
        return head

    @property
    def frozen_layers(self) -> dict[str, FrozenLinear]:
        """All linear layers, by name."""
        named = self.network.named_modules()
        return {name: module for name, module in named if isinstance(module, FrozenLinear)}

    @property
    def layers(self) -> dict[str, BranchedLinear]:
        """The layers that carry a branch, by name."""
        return {name: layer for name, layer in self.frozen_layers.items() if isinstance(layer, BranchedLinear)}

    def stored_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the base as it is stored, by name, in a fixed order."""
        for name, module in sorted(self.network.named_modules()):
            if isinstance(module, FrozenLinear):
                yield from ((f"{name}.{part}", tensor) for part, tensor in module.base.stored())
            local = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            yield from ((f"{name}.{part}", tensor) for part, tensor in sorted(local) if tensor is not None)

    def base_sha256(self) -> str:
        """A hash of every byte of the base, a tensor at a time: unchanged by training with target = adapter."""
        digest = hashlib.sha256()
        for name, tensor in self.stored_tensors():
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()


def attach_branches(model: EdgeModel, *, rank: int, guided: bool = False) -> None:
    """Give every BranchedLinear of the model an untouched branch; layers with the same input share a basis.

    Who shares is seen, not guessed from names: a tiny forward records which tensor each layer was given.
    Raises ModelError for layers that the forward never calls, or calls with something that is not
    (rows, tokens, features), as routed experts do.
    """
    inputs = _layer_inputs(model)
    faults = [f"{name}: not used by the model's forward" for name in model.layers if name not in inputs]
    faults += [
        f"{name}: reads an input of shape {tuple(x.shape)}, not (rows, tokens, features)"
        for name, x in inputs.items()
        if x.shape[:-1] not in ((1, PROBE_TOKENS), (PROBE_TOKENS,))
    ]
    if faults:
        raise ModelError(
            f"{model.source}: these layers cannot be adapted (leave them out with --target-modules):\n  "
            + "\n  ".join(faults)
        )
    tensors: list[Tensor] = []
    layers = []
    for name, layer in model.layers.items():
        x = inputs[name]
        group = next((index for index, known in enumerate(tensors) if known is x), len(tensors))
        if group == len(tensors):
            tensors.append(x)
        layers.append((name, layer.out_features, group))
    widths = [x.shape[-1] for x in tensors]
    model.branches = make_branches(layers, widths, rank=rank, guided=guided, device=model.device)
    for branch, layer in zip(model.branches, model.layers.values(), strict=True):
        layer.branch = branch
        branch.held = layer.base if isinstance(layer.base, HeldWeight) else None


def require_guidable(model: EdgeModel) -> None:
    """Raise ModelError for a model in which the errors at the head guide no layer's noise."""
    if all(branch.guide is None for branch in model.branches):
        raise ModelError(f"{model.source}: none of the layers to train writes to the residual stream: use --guide none")
    last = model.last_module
    if last is None or any(isinstance(module, BranchedLinear) for module in last.modules()):
        raise ModelError(f"{model.source}: its hidden states come from no last norm: use --guide none")


def _layer_inputs(model: EdgeModel) -> dict[str, Tensor]:
    """The tensor that each branched layer is given in one tiny forward; the head is checked on the way."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _module, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in model.layers.items()
    ]
    ids = torch.arange(PROBE_TOKENS, device=model.device).unsqueeze(0) % model.vocab_size
    mask = torch.ones_like(ids)
    put_out: dict[int, Any] = {}  # by the address of a tensor, the module that put it there last

    def see(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            put_out[output.data_ptr()] = module

    hooks += [module.register_forward_hook(see) for module in model.network.base_model.modules()]
    try:
        with torch.no_grad(), model.context.running(mask=mask.bool(), refresh=Refresh.NONE):
            expected = model.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
            put_out.clear()
            hidden = model.hidden_states(ids)
            model.last_module = put_out.get(hidden.data_ptr())
            ours = model.logits(hidden)
            ids[:, -1] += 1
            before_last = model.hidden_states(ids)[:, :-1]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:  # the last: of a layer of ours
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{model.source}: its own forward pass fails: {said}") from error
    finally:
        for hook in hooks:
            hook.remove()
    moved = (hidden[:, :-1] - before_last).float().abs().mean()
    if moved > 1e-3 * hidden.float().abs().mean():  # routed experts may move a token by its rounding
        raise ModelError(f"{model.source}: is no causal language model: its tokens see the ones after them")
    if not torch.allclose(ours.float(), expected.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
        kind = type(model.network).__name__
        raise ModelError(f"{model.source}: {kind} does more to its logits than its head: it cannot be trained here")
    return inputs
