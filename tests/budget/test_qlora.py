import pytest
from checkpoints import llama_facts

from agzo_edge.budget.memory import job_of
from agzo_edge.budget.plan import memory_plan
from agzo_edge.budget.profile import load_profile
from agzo_edge.budget.qlora import QloraNeed, qlora_need
from agzo_edge.config import config_from
from agzo_edge.units import GIB

GPU = load_profile("rtx-3060-12gb")
LLAMA_65B = llama_facts(
    hidden_size=8192,
    intermediate_size=22016,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=64,
    vocab_size=32_000,
)


def need(facts: object, **settings: object) -> QloraNeed:
    return qlora_need(job_of(facts, config_from(settings), GPU))  # type: ignore[arg-type]


def test_65_billion_weights_fit_a_card_of_48_gb_as_the_paper_says() -> None:
    paper = need(LLAMA_65B, batch_size=1, max_seq_length=512, adapter_rank=64)
    assert 36 * GIB < paper.total_bytes < 48 * GIB
    assert paper.parts["base"] / GIB == pytest.approx(31.2 + 0.98, abs=0.3)  # 65e9 weights, and 0.53e9 in 16 bit


def test_every_part_of_a_small_model_is_the_sum_by_hand() -> None:
    # hidden 16, MLP 32, key heads 8, 2 blocks, vocabulary 50, in 16 bit: 2 rows of 10 tokens
    parts = need(llama_facts(), batch_size=2, max_seq_length=10, adapter_rank=4).parts
    weights = 2 * (16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 32)
    widths = 2 * (16 + 16) + 2 * (8 + 16) + 3 * (32 + 16)
    assert parts["base"] == round(weights * 4.127 / 8) + 2 * (2 * 50 * 16 + 2 * 16)
    assert parts["adapter"] == 2 * widths * 4 * 10
    assert parts["checkpoints"] == 20 * 16 * 2 * 2
    assert parts["block"] == 20 * 2 * (16 + 16 + 16 + 32 + 16 + 8 + 8 + 16 + 32 + 32 + 16)
    assert parts["logits"] == 20 * 50 * 8
    assert parts["workspace"] == 16 * 32 * 2


def test_streams_are_no_rows_of_qlora_and_one_example_needs_least() -> None:
    central, exact = (need(LLAMA_65B, batch_size=8, difference=kind) for kind in ("central", "exact"))
    apart = need(LLAMA_65B, batch_size=8, fuse_signs=False)
    assert central == exact == apart
    assert central.smallest_bytes < central.total_bytes
    assert need(LLAMA_65B, batch_size=8, micro_batch_size=1).total_bytes == central.smallest_bytes


def test_a_plan_brings_the_comparison() -> None:
    plan = memory_plan(LLAMA_65B, config_from({"batch_size": 4, "offload": "layers"}), GPU)
    assert plan.qlora == need(LLAMA_65B, batch_size=4)
    assert plan.to_dict()["qlora"]["smallest_bytes"] == plan.qlora.smallest_bytes
