import numpy as np
import pytest
import torch
from character_tokens import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.train.data import Example, collate, micro_batches, pad_id_of
from agzo_edge.train.tokens import TokenRow

PAD = 9


def token_row(n_prompt: int, n_labels: int, *, first_id: int = 100) -> TokenRow:
    n_tokens = n_prompt + n_labels
    return TokenRow(np.arange(first_id, first_id + n_tokens), np.arange(n_tokens) >= n_prompt)


LM = [
    Example((token_row(2, 1),), 0, "f:1"),
    Example((token_row(1, 4),), 0, "f:2"),
    Example((token_row(3, 3),), 0, "f:3"),
]
CHOICE = [
    Example((token_row(2, 1), token_row(2, 3)), 1, "f:1"),
    Example((token_row(1, 1), token_row(1, 2), token_row(1, 5)), 0, "f:2"),
]


def test_rows_are_padded_on_the_right_and_the_padding_is_masked() -> None:
    batch = collate(LM, pad_id=PAD, objective="lm")
    assert batch.input_ids.tolist()[0] == [100, 101, 102, PAD, PAD, PAD]
    assert batch.attention_mask.sum(1).tolist() == [3, 5, 6]
    assert batch.is_label.sum(1).tolist() == [1, 4, 3]
    assert not (batch.is_label & (batch.attention_mask == 0)).any()
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.example.dtype == torch.int64
    assert batch.is_label.dtype == torch.bool
    assert batch.places == ("f:1", "f:2", "f:3")


def test_an_lm_example_weighs_its_share_of_the_label_tokens() -> None:
    batch = collate(LM, pad_id=PAD, objective="lm")
    torch.testing.assert_close(batch.weights, torch.tensor([1.0, 4.0, 3.0]) / 8)
    assert batch.answer.tolist() == [0, 0, 0]


def test_choice_examples_weigh_the_same_and_know_their_rows() -> None:
    batch = collate(CHOICE, pad_id=PAD, objective="choice")
    assert batch.weights.tolist() == [0.5, 0.5]
    assert batch.example.tolist() == [0, 0, 1, 1, 1]
    assert batch.answer.tolist() == [1, 0]


@given(
    n_labels=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    micro_batch_size=st.integers(1, 50),
    objective=st.sampled_from(["lm", "choice"]),
)
def test_micro_batches_hold_the_batch_in_order_with_its_weights(n_labels, micro_batch_size, objective) -> None:
    examples = [Example((token_row(1, n),), 0, f"f:{i}") for i, n in enumerate(n_labels)]
    whole = collate(examples, pad_id=PAD, objective=objective)
    parts = list(micro_batches(examples, micro_batch_size=micro_batch_size, pad_id=PAD, objective=objective))
    assert sum(part.weights.sum().item() for part in parts) == pytest.approx(1, abs=1e-6)
    assert torch.equal(torch.cat([part.weights for part in parts]), whole.weights)
    assert sum((part.places for part in parts), ()) == whole.places
    for part in parts:
        assert part.places[0] == whole.places[part.first_example]
        assert len(part.places) <= micro_batch_size


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = collate(CHOICE, pad_id=PAD, objective="choice").to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert {value.device.type for value in tensors} == {"meta"}


def test_the_pad_id_is_the_tokenizers_own_or_its_eos() -> None:
    tokenizer = character_tokenizer("$A")
    assert pad_id_of(tokenizer) == tokenizer.eos_token_id
    tokenizer.pad_token = "<s>"
    assert pad_id_of(tokenizer) == tokenizer.bos_token_id
    tokenizer.pad_token = tokenizer.eos_token = None
    assert pad_id_of(tokenizer) == 0
