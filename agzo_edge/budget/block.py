"""How a block of a model computes, told from config.json and the names of its tensors.

It decides which tensors are alive at the same time, and so what a forward pass takes (activations.py).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from agzo_edge.budget.sizes import is_size

MlpStyle = Literal["plain", "gated", "fused gate", "written out"]

_WRITTEN_OUT = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu")  # temporaries instead of one kernel
_FUSED_GATES = ("gate_up_proj", "input_linear")  # the latter in Granite 4's shared MLP
_FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")
# Without fused attention in transformers 5.23: some add biases or sinks that its kernels do not know.
_EAGER = (
    *("bloom", "codegen", "deepseek_v4", "flint", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj"),
    *("granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash", "mpt", "xglm"),
)
# Whose runs' peaks benchmarks/plan_error.py compares with their plans, and those that transformers computes alike.
MEASURED = (
    *("gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "opt", "phi3", "qwen3"),
    *("gemma", "ministral3", "qwen2", "seed_oss", "smollm3"),
)


class Experts(NamedTuple):
    """MLPs of which each token meets some."""

    per_token: int
    width: int  # of one


@dataclass(frozen=True, kw_only=True)
class DeltaRule:
    """Linear attention by the gated delta rule, as some layers of Qwen3-Next, Qwen3.5 and OLMo Hybrid have it."""

    heads: int  # of values; queries and keys are repeated to as many
    key_dim: int  # of one head
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block by what it keeps while it computes."""

    mlp_width: int
    mlp_style: MlpStyle
    fused_qkv: bool  # one layer makes queries, keys and values, whose tensor lives until the block's output
    rotary: bool  # queries and keys are rotated; else positions are added to the embeddings
    positions_by_row: bool  # the added positions are looked up for every row (OPT), not once for all (GPT-2)
    keeps_scores: bool  # attention is written out, and keeps its (tokens, tokens) scores until the block's end
    uneven_heads: bool  # keys and values come out of a latent, of different widths: no fused kernel on a CPU
    caps_scores: bool  # attention is ours, some queries at a time: no fused kernel knows a soft cap (Gemma 2)
    delta_rule: DeltaRule | None  # of the layers whose attention is linear
    experts: Experts | None  # where the router and their width are known
    window: int | None  # tokens that a token sees in some layers: rows as long or longer need a mask for it


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
        keeps_scores=config.get("model_type") in _EAGER,
        uneven_heads="kv_b_proj" in leaves,
        caps_scores=bool(config.get("attn_logit_softcapping")),
        delta_rule=_delta_rule(config),
        experts=_experts(config, tensors),
        window=_window(config),
    )


def _experts(config: Mapping[str, Any], tensors: Collection[str]) -> Experts | None:
    if not any(".experts." in name for name in tensors):
        return None
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    per_token = config.get("num_experts_per_tok")
    return Experts(per_token, width) if is_size(per_token) and is_size(width) else None


def _delta_rule(config: Mapping[str, Any]) -> DeltaRule | None:
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "linear_attention" not in kinds:
        return None
    given = (config.get(f"linear_{name}") for name in ("num_value_heads", "key_head_dim", "value_head_dim"))
    sizes = [size for size in given if is_size(size)]
    return DeltaRule(heads=sizes[0], key_dim=sizes[1], value_dim=sizes[2]) if len(sizes) == 3 else None


def _mlp_width(config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]]) -> int:
    if fused := [out for name, (out, _) in linears.items() if name.endswith(_FUSED_GATES)]:
        return max(fused) // 2
    given = config.get("intermediate_size") or config.get("n_inner") or config.get("ffn_dim")
    return given if is_size(given) else max(max(shape) for shape in linears.values())


def _mlp_style(config: Mapping[str, Any], leaves: set[str]) -> MlpStyle:
    """What the MLP does between its layers; it decides how many of its wide tensors live at once."""
    if leaves & set(_FUSED_GATES):
        return "fused gate"
    if leaves & {"gate_proj", "w1"}:
        return "gated"
    activation = config.get("hidden_act") or config.get("activation_function")
    return "written out" if activation in _WRITTEN_OUT else "plain"


def _window(config: Mapping[str, Any]) -> int | None:
    """The narrowest window of a layer's attention; some configurations name one that no layer uses."""
    kinds = config.get("layer_types")
    if config.get("use_sliding_window") is False or (
        isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    ):
        return None
    named = (config.get(key) for key in ("sliding_window", "attention_chunk_size"))
    return min((size for size in named if is_size(size)), default=None)
