"""Attention where torch's fast kernels cannot be taken as they are: exact differences, capped scores, older cards."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from agzo_edge.budget.activations import CAPPED_QUERIES
from agzo_edge.numerics.products import in_blocks

_SHARES_NO_KEYS = nn.Module()  # as transformers' attention asks a layer for the number of heads that share a key


@contextmanager
def exact_attention(wanted: bool) -> Iterator[None]:
    """Inside, attention uses the one kernel that has a forward-mode rule; the fast ones raise."""
    if not wanted:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch scripts its own rules, and warns of it
        import_module("torch._decomp.decompositions_for_jvp")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def unpacked_rows() -> Iterator[None]:
    """Inside, transformers takes it that no row holds several sequences: to look, it waits for the device."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    look = getattr(masking_utils, name, None)
    if look is None:  # another version has another way, or none
        yield
        return
    setattr(masking_utils, name, lambda _position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, look)


def choose_attention(network: Any, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give a network our attention where transformers' choice would have all scores at once.

    That is so where scores are capped (Gemma 2), and, with fewer key heads than query heads, on cards without the flash
    kernel, the only fast one that shares keys: before compute capability 8.0, or in float32.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if getattr(network.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        name, ours = "agzo_edge_capped", capped_attention
    elif network.config._attn_implementation == "sdpa" and not _has_flash(device, dtype):
        name, ours = "agzo_edge_repeated", repeated_attention
    else:
        return
    ALL_ATTENTION_FUNCTIONS.register(name, ours)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    network.set_attn_implementation(name)


def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the flash kernel computes in this dtype here. Source: torch 2.13, its CUDA build's `sdp_utils.cpp`."""
    return device.type == "cpu" or (dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0))


def repeated_attention(
    _module: nn.Module,
    query: Tensor,  # (rows, heads, tokens, width)
    key: Tensor,  # (rows, key_heads, keys, width)
    value: Tensor,  # (rows, key_heads, keys, width)
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:  # (rows, tokens, heads, width)
    """transformers' attention with a copy of its keys and values for each query head, which every kernel takes."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (sharing := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(sharing, dim=1), value.repeat_interleave(sharing, dim=1)
    attended: Tensor = sdpa_attention_forward(_SHARES_NO_KEYS, query, key, value, attention_mask, **others)[0]
    return attended, None


def capped_attention(
    _module: nn.Module,
    query: Tensor,  # (rows, heads, tokens, width)
    key: Tensor,  # (rows, key_heads, keys, width)
    value: Tensor,  # (rows, key_heads, keys, width)
    attention_mask: Tensor | None,  # (rows, 1, tokens, keys) bool, True where a token looks; None: causal
    *,
    scaling: float,
    softcap: float,
    **_others: Any,
) -> tuple[Tensor, None]:  # (rows, tokens, heads, width)
    """softmax(cap tanh(scaling Q Kᵀ / cap)) V (Gemma 2, arXiv 2408.00118, section 2), some queries at a time."""
    dtype, n_queries, n_keys = query.dtype, query.shape[2], key.shape[2]
    if in_blocks(query):  # numerics/products.py says why not in 16 bit
        query, key, value = query.float(), key.float(), value.float()
    query = (query * (scaling / softcap)).unflatten(1, (key.shape[1], -1))  # heads that share a key together
    before = 0 if n_queries > 1 else n_keys - 1  # keys of tokens before the first query's
    attended = []
    for start in range(0, n_queries, CAPPED_QUERIES):
        some = query[..., start : start + CAPPED_QUERIES, :]
        stop = start + some.shape[3]
        if attention_mask is None:
            seen = before + stop
            looks = torch.ones(stop - start, seen, dtype=torch.bool, device=key.device).tril(before + start)
        else:
            seen = n_keys
            looks = attention_mask[:, :, None, start:stop]
        scores = (some.flatten(2, 3) @ key[:, :, :seen].mT).float().unflatten(2, some.shape[2:4])
        scores = scores.tanh() * softcap
        scores = scores.masked_fill(~looks, torch.finfo(scores.dtype).min)
        shares = scores.softmax(dim=-1).to(value.dtype).flatten(2, 3)
        attended.append((shares @ value[:, :, :seen]).unflatten(2, some.shape[2:4]))
    return torch.cat(attended, dim=3).flatten(1, 2).transpose(1, 2).to(dtype).contiguous(), None
