"""How a block of a model computes, told from config.json and the names of its tensors.

It decides which tensors are alive at the same time, and so what a forward pass takes (activations.py).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MlpStyle = Literal["plain", "gated", "fused gate", "written out"]

_WRITTEN_OUT = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu")  # temporaries instead of one kernel
_FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")
_TWO_MASKS = ("gemma2", "gemma3", "gemma3_text", "cohere2")  # windows in some layers, though no layer_types say so


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block by what it keeps while it computes."""

    mlp_width: int
    mlp_style: MlpStyle
    fused_qkv: bool  # one layer makes queries, keys and values, whose tensor lives until the block's output
    rotary: bool  # queries and keys are rotated; else positions are added to the embeddings
    positions_by_row: bool  # the added positions are looked up for every row (OPT), not once for all (GPT-2)
    keeps_scores: bool  # attention keeps its (tokens, tokens) scores: no fused kernel knows a soft cap
    n_masks: int  # of attention: two where some layers see a window and others everything


def block_of(config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]], tensors: Collection[str]) -> Block:
    """The block of the model with this text configuration, these adaptable layers and these tensors."""
    leaves = {name.rsplit(".", 1)[-1] for name in linears}
    tables = {name.split(".")[-2] for name in tensors if name.endswith(".weight")} & set(_POSITION_TABLES)
    return Block(
        mlp_width=_mlp_width(config, linears),
        mlp_style=_mlp_style(config, leaves),
        fused_qkv=bool(leaves & set(_FUSED_QKV)),
        rotary=not tables,
        positions_by_row="embed_positions" in tables,
        keeps_scores=bool(config.get("attn_logit_softcapping")),
        n_masks=_n_masks(config),
    )


def _mlp_width(config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]]) -> int:
    given = config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim")
    return given if type(given) is int and given > 0 else max(max(shape) for shape in linears.values())


def _mlp_style(config: Mapping[str, Any], leaves: set[str]) -> MlpStyle:
    """What the MLP does between its layers; it decides how many of its wide tensors live at once."""
    if "gate_up_proj" in leaves:
        return "fused gate"
    if leaves & {"gate_proj", "w1"}:
        return "gated"
    activation = config.get("hidden_act") or config.get("activation_function")
    return "written out" if activation in _WRITTEN_OUT else "plain"


def _n_masks(config: Mapping[str, Any]) -> int:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return len({str(kind) for kind in kinds} & {"full_attention", "sliding_attention"}) or 1
    return 2 if config.get("model_type") in _TWO_MASKS else 1
