"""What a plan must know about a model, told from its configuration and its tensors' names and shapes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agzo_edge.budget.block import Block, block_of
from agzo_edge.budget.headers import QUANT_STATE, Checkpoint, StoredTensor
from agzo_edge.budget.hub import open_checkpoint
from agzo_edge.budget.sizes import EMBEDDINGS, attention_sizes, block_number, is_size, layers_in, sizes_of
from agzo_edge.config import RunConfig
from agzo_edge.errors import ModelError, numbered
from agzo_edge.writers import ALL_LINEAR, is_beside_text, is_in_state_space, targets_among, writes_to_residual

StoredAs = Literal["dense", "4bit", "4bit-nested", "8bit"]

_TABLES = (*EMBEDDINGS, "embed_tokens_per_layer")  # the last is Gemma 3n's
_HEADS = ("lm_head", "embed_out")
_WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", QUANT_STATE)
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
MLP_MODULES = ("mlp", "feed_forward", "ffn")  # of a block's part that knows no neighbouring tokens
_AHEAD = re.compile(r"(?:^|\.)mtp\w*\.")  # blocks that guess further tokens: transformers leaves them in the file


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A causal language model by its sizes."""

    source: str
    model_type: str
    tensors: Mapping[str, StoredTensor]  # that are loaded
    linears: Mapping[str, tuple[int, int]]  # adaptable layers inside the blocks: (out_features, in_features)
    stored_as: StoredAs  # how the checkpoint holds them
    embedding_entries: int
    head_entries: int  # 0 when the head is tied to the embeddings
    other_entries: int  # norms, biases, positions, and what is not adapted
    vocab_size: int
    hidden_size: int
    n_layers: int
    layers_stored: int  # the blocks that the weights have
    n_heads: int
    query_width: int  # features of all query heads together
    kv_width: int  # of all key heads
    block: Block
    caps_logits: bool  # tanh of the logits: one more copy of them
    divides_logits: bool  # by a constant, or multiplies (Granite, Cohere): one more copy where they carry a tangent
    positions: int | None  # tokens in the longest row that the model was made for, where it says so
    rotary_change: int | None = None  # tokens of a row, above which a whole batch's positions turn otherwise (longrope)

    @property
    def tied(self) -> bool:
        """Whether embeddings and head are one tensor."""
        return self.head_entries == 0

    @property
    def has_mlp_module(self) -> bool:
        """Whether a block's MLP is a module that can be given a part of the tokens."""
        return any(part in MLP_MODULES for name in self.linears for part in name.split("."))

    @property
    def largest_other(self) -> str:
        """The name of the largest tensor that is no adaptable layer: of the embeddings or the head."""
        layers = {f"{name}.weight" for name in self.linears}
        others = {name: tensor.n_entries for name, tensor in self.tensors.items() if name not in layers}
        return max(others, key=others.__getitem__)

    @property
    def n_parameters(self) -> int:
        """Weights in all, the tied head counted once."""
        linear = sum(out * inp for out, inp in self.linears.values())
        return linear + self.embedding_entries + self.head_entries + self.other_entries

    @property
    def has_experts(self) -> bool:
        """Whether it routes tokens to experts, whose weights transformers fuses: they stay as they are."""
        return any(".experts." in name for name in self.tensors)

    @property
    def has_state_space(self) -> bool:
        """Whether blocks have state-space mixers beside attention."""
        return any(map(is_in_state_space, self.tensors))

    def targets(self, wanted: Sequence[str] | None) -> dict[str, tuple[int, int]]:
        """The layers to train, as `targets_among`. Raises ModelError naming each of `wanted` that matches nothing."""
        chosen, missing = targets_among(self.linears, wanted)
        if missing:
            raise ModelError(f"{self.source}: no layer matches {', '.join(missing)}; there are {self._kinds}")
        return {name: shape for name, shape in self.linears.items() if name in chosen}

    def room_for(self, config: RunConfig) -> int | None:
        """Tokens that a row of a run may have beside those written after it; None where the model does not say."""
        return None if self.positions is None else max(2, self.positions - config.written_tokens)

    def require_trainable(self, wanted: Sequence[str] | None) -> None:
        """Raise ModelError for a model of experts where the layers to train are not named."""
        if self.has_experts and (not wanted or ALL_LINEAR in wanted):
            raise ModelError(
                f"{self.source}: routes tokens to experts, whose fused weights AGZO cannot adapt. Name the layers to "
                f"train with --target-modules, and they stay frozen; there are {self._kinds}"
            )

    @property
    def _kinds(self) -> str:
        """The last parts of the layers' names."""
        return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in self.linears}))


def model_facts(source: str) -> ModelFacts:
    """The facts of the model at `source`, a directory or a hub id; reads headers only.

    Raises ModelError when there is no such model, or it is no causal language model of a known form.
    """
    return facts_of(open_checkpoint(source))


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """The facts that a checkpoint's headers hold. Raises ModelError for what is no causal language model."""
    source, config = checkpoint.source, _text_config(checkpoint)
    sizes = sizes_of(config, checkpoint.tensors, source=source)
    n_stored = len(checkpoint.tensors)
    if sizes.n_layers > n_stored:
        raise ModelError(
            f"{source}: config.json gives {sizes.n_layers:,} layers, and the weights are {n_stored:,} tensors"
        )
    loaded = replace(checkpoint, tensors=_loaded(checkpoint.tensors, n_layers=sizes.n_layers))
    linears = _linear_layers(loaded, hidden=sizes.hidden_size)
    if not linears:
        raise ModelError(f"{source}: no linear layer inside its blocks: nothing that AGZO could train")
    tied = bool(config.get("tie_word_embeddings", False))
    parts = _rest_by_kind(loaded, linears, tied=tied)
    attention = attention_sizes(config, linears, loaded.tensors, source=source, hidden=sizes.hidden_size)
    return ModelFacts(
        source=source,
        model_type=str(config.get("model_type", "")),
        tensors=loaded.tensors,
        linears=linears,
        stored_as=_stored_as(loaded, linears),
        embedding_entries=parts["embeddings"],
        head_entries=parts["head"],
        other_entries=parts["other"],
        **sizes._asdict(),
        layers_stored=layers_in(checkpoint.tensors),
        **attention._asdict(),
        block=block_of(config, linears, loaded.tensors),
        caps_logits=bool(config.get("final_logit_softcapping")),
        divides_logits=bool(config.get("logits_scaling") or config.get("logit_scale")),
        positions=_positions(config),
        rotary_change=_rotary_change(config),
    )


def _rotary_change(config: Mapping[str, Any]) -> int | None:
    """The length at which a model of Phi-3's kind takes its long factors, for all rows of a batch."""
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rotary, Mapping) or "longrope" not in (rotary.get("rope_type"), rotary.get("type")):
        return None
    length = rotary.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return length if isinstance(length, int) else None


def input_groups(linears: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The width of each input that layers share (q, k, v; gate, up), by the first layer's name.

    Guessed from names, as no forward can be watched before the weights are here.
    """
    groups: dict[tuple[str, str], tuple[str, int]] = {}
    for name, (_, in_features) in linears.items():
        parent, _, leaf = name.rpartition(".")
        kind = next((kinds[0] for kinds in _SHARED_INPUTS if leaf in kinds), leaf)
        groups.setdefault((parent, kind), (name, in_features))
    return dict(groups.values())


def _text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The language model's part of config.json. Raises ModelError unless it is a causal language model."""
    config = checkpoint.config
    architectures = config.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    nested = config.get("text_config")
    causal = ("ForCausalLM", "LMHeadModel", *(("ForConditionalGeneration",) if nested else ()))
    faults = []
    if architectures and not any(str(name).endswith(causal) for name in architectures):
        faults.append(f"its architecture is {', '.join(map(repr, architectures))}")
    if config.get("is_encoder_decoder"):
        faults.append("it is an encoder and a decoder")
    if (kind := str(config.get("model_type"))) in _WITHOUT_ATTENTION:
        faults.append(f"{kind} has no attention, and its kernels read the weights past the layers")
    if faults:
        raise ModelError(f"{checkpoint.source}: not a causal language model: {'; '.join(faults)}")
    return {**config, **nested} if isinstance(nested, dict) else config


def _loaded(tensors: Mapping[str, StoredTensor], *, n_layers: int) -> dict[str, StoredTensor]:
    """Those tensors that become the model: no block after the last one, none that guesses further tokens, no mask.

    Old GPT-2 and GPT-NeoX files hold each block's causal mask, (1, 1, tokens, tokens).
    """
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not _AHEAD.search(name)
        and (is_beside_text(name) or (block_number(name) or 0) < n_layers)
        and not (len(tensor.shape) == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3])
    }


def _linear_layers(checkpoint: Checkpoint, *, hidden: int) -> dict[str, tuple[int, int]]:
    """Each linear layer inside a numbered block, with (out_features, in_features) of the unpacked weight."""
    linears = {}
    faults = []
    for name, tensor in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or len(tensor.shape) != 2 or block_number(name) is None:
            continue
        if is_beside_text(name) or is_in_state_space(name) or ".experts." in name:
            continue
        shape = (tensor.shape[0], tensor.shape[1])
        if f"{name}.absmax" in checkpoint.tensors:
            shape = checkpoint.true_shapes.get(name) or _unpacked_shape(layer, 2 * tensor.n_bytes, hidden=hidden)
            if (shape[0] * shape[1] + 1) // 2 != tensor.n_bytes:
                faults.append(f"{name}: {tensor.n_bytes} bytes are not {shape[0]} x {shape[1]} weights of 4 bit")
        elif _is_conv1d(checkpoint):
            # Stored (in, out); once quantized it is an ordinary layer.
            shape = (tensor.shape[1], tensor.shape[0])
        linears[layer] = shape
    if faults:
        raise ModelError(f"{checkpoint.source}: broken checkpoint:\n{numbered(faults)}")
    return linears


def _is_conv1d(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def _unpacked_shape(layer: str, n_weights: int, *, hidden: int) -> tuple[int, int]:
    """(out, in) of a packed weight whose quant_state was not read: one side is the model's width."""
    other = n_weights // hidden
    return (hidden, other) if writes_to_residual(layer) else (other, hidden)


def _stored_as(checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]) -> StoredAs:
    """How the checkpoint holds its layers; one packed layer tells for all."""
    names = checkpoint.tensors.keys()
    if any(f"{layer}.weight.nested_absmax" in names for layer in linears):
        return "4bit-nested"
    if any(f"{layer}.weight.absmax" in names for layer in linears):
        return "4bit"
    if any(f"{layer}.SCB" in names for layer in linears):
        return "8bit"
    settings = checkpoint.config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise ModelError(
            f"{checkpoint.source}: config.json gives quantization_config as {settings!r}, which is no table"
        )
    method = settings.get("quant_method")
    if method not in (None, "bitsandbytes"):
        raise ModelError(
            f"{checkpoint.source}: quantized with {method}, which is not read: use the unquantized model, "
            "and it is quantized while it is loaded"
        )
    return "dense"


def _rest_by_kind(checkpoint: Checkpoint, linears: Mapping[str, Any], *, tied: bool) -> dict[str, int]:
    """Entries of all tensors that are no adaptable layer and that text meets: embeddings, head, other."""
    entries = {"embeddings": 0, "head": 0, "other": 0}
    for name, tensor in checkpoint.tensors.items():
        layer, _, part = name.rpartition(".")
        if (part == "weight" and layer in linears) or is_beside_text(name):
            continue
        if part in ("SCB", "weight_format") or _is_companion(name):
            continue
        leaf = layer.rsplit(".", 1)[-1]
        if leaf in _HEADS and part == "weight":
            entries["head"] += 0 if tied else tensor.n_entries
        else:
            entries["embeddings" if leaf in _TABLES else "other"] += tensor.n_entries
    return entries


def _is_companion(name: str) -> bool:
    """Whether a tensor holds another one's scales or code book."""
    return ".weight." in name and any(mark in name for mark in _COMPANIONS)


def _positions(config: Mapping[str, Any]) -> int | None:
    """The longest row by config.json; what is no positive number says nothing."""
    given = config.get("max_position_embeddings") or config.get("n_positions")
    return given if is_size(given) else None
