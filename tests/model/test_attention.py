"""Attention without padding masks, and with capped scores, against transformers' own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    FAMILIES,
    model_logits,
    reference,
    relative_error,
    run_config,
    tiny_batch,
    tiny_checkpoint,
    tiny_model,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from agzo_edge.budget.activations import CAPPED_QUERIES
from agzo_edge.model import attention
from agzo_edge.model.attention import capped_attention, repeated_attention
from agzo_edge.model.passes import Refresh
from agzo_edge.train.objective import GOALS
from agzo_edge.train.step import _losses


def eager(query, key, value, mask, *, scaling: float, softcap: float) -> torch.Tensor:
    """transformers' attention of Gemma 2, with all scores at once."""
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], training=False)
    added = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return eager_attention_forward(module, query, key, value, added, scaling=scaling, softcap=softcap)[0]


def drawn(rows: int, queries: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """A query of 6 heads, and keys and values of 2."""
    shapes = (6, queries), (2, keys), (2, keys)
    return tuple(3 * torch.randn(rows, heads, tokens, 8, dtype=dtype) for heads, tokens in shapes)


@given(
    rows=st.integers(1, 2),
    tokens=st.integers(2, 20),
    window=st.sampled_from([None, 1, 5]),
    queries=st.sampled_from([1, 3, 7, CAPPED_QUERIES]),
)
def test_capped_attention_in_blocks_is_the_eager_one(rows: int, tokens: int, window: int | None, queries: int) -> None:
    query, key, value = drawn(rows, tokens, tokens)
    looks = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        looks = looks.triu(1 - window)
    looks = looks.expand(rows, 1, tokens, tokens)
    mask = None if window is None else looks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CAPPED_QUERIES", queries)
        ours, _ = capped_attention(None, query, key, value, mask, scaling=0.3, softcap=20.0)
    expected = eager(query, key, value, looks, scaling=0.3, softcap=20.0)
    assert ours.shape == expected.shape
    assert relative_error(ours, expected) < 1e-5


def test_a_token_that_is_written_sees_all_keys_before_it() -> None:
    query, key, value = drawn(2, 1, 9)
    ours, _ = capped_attention(None, query, key, value, None, scaling=0.3, softcap=20.0)
    everything = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    assert relative_error(ours, eager(query, key, value, everything, scaling=0.3, softcap=20.0)) < 1e-5


def test_capped_attention_in_16_bit_stays_in_its_dtype() -> None:
    query, key, value = drawn(1, 12, 12, dtype=torch.bfloat16)
    ours, _ = capped_attention(None, query, key, value, None, scaling=0.3, softcap=20.0)
    exact, _ = capped_attention(None, query.float(), key.float(), value.float(), None, scaling=0.3, softcap=20.0)
    assert ours.dtype is torch.bfloat16
    assert relative_error(ours.float(), exact) < 0.01


@pytest.mark.parametrize("windowed", [False, True])
def test_keys_repeated_for_kernels_that_cannot_share_them_give_the_same(windowed: bool) -> None:
    query, key, value = drawn(2, 9, 9)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2).expand(2, 1, 9, 9) if windowed else None
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    ours, _ = repeated_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert relative_error(ours, theirs) < 1e-6


def test_a_network_on_a_card_without_the_flash_kernel_has_its_keys_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, plain = tiny_batch(), tiny_model("llama")
    monkeypatch.setattr(attention, "_has_flash", lambda _device, _dtype: False)
    repeating = tiny_model("llama")
    assert repeating.network.config._attn_implementation == "agzo_edge_repeated"
    assert relative_error(model_logits(repeating, batch), model_logits(plain, batch)) < 1e-5


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_padding_at_the_end_needs_no_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CAPPED_QUERIES", 7)
    model = tiny_model(family)
    ids = torch.randint(3, model.vocab_size, (2, 24))
    mask = torch.ones_like(ids)
    ids[1, -9:], mask[1, -9:] = 0, 0
    with torch.no_grad(), model.context.running(mask=mask.bool()):
        ours = model.logits(model.hidden_states(ids))
        expected = reference(tiny_checkpoint(family))(input_ids=ids, attention_mask=mask).logits
    assert relative_error(ours[mask.bool()], expected[mask.bool()]) < 1e-4


class Asked(TorchDispatchMode):
    """Counts the operations that wait for a device to tell a value."""

    n = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_value_is_asked_of_the_device_before_the_losses_are_there(family: str) -> None:
    model, batch, config = tiny_model(family, load_in_4bit=True), tiny_batch(3), run_config(rank=2)
    with Asked() as asked:
        _losses(model, batch, GOALS["lm"], step=1, mu=0.01, config=config, refresh=Refresh.NONE)
    assert asked.n == 0
