"""The model card."""

import yaml

from agzo_edge.record.card import model_card

FACTS = {
    "base_model": "Qwen/Qwen3-8B",
    "quantization": "4-bit NF4",
    "data_file": "/home/somebody/secret/notes.jsonl",
    "data_sha256": "ab" * 32,
    "n_rows": 1234,
    "settings": {"learning_rate": 0.1, "rank": 4, "text": "a|b\nc"},
    "steps": 500,
    "loss_before": 4.35,
    "loss_after": 1.47,
    "peak_bytes": 6 * 1024**3,
    "version": "0.1.0",
}


def _front_matter(card: str) -> dict[str, object]:
    _, text, _ = card.split("---\n", 2)
    fields: dict[str, object] = yaml.safe_load(text)
    return fields


def test_the_front_matter_is_what_the_hub_and_peft_expect() -> None:
    fields = _front_matter(model_card(FACTS))
    assert fields["base_model"] == "Qwen/Qwen3-8B"
    assert fields["library_name"] == "peft"
    assert fields["pipeline_tag"] == "text-generation"
    assert {"base_model:adapter:Qwen/Qwen3-8B", "lora"} <= set(fields["tags"])  # type: ignore[call-overload]


def test_every_fact_is_told() -> None:
    card = model_card(FACTS)
    for text in ("`notes.jsonl`", "ab" * 32, "1,234", "4.3500", "1.4700", "6.00 GiB", "`0.1`", "4-bit NF4"):
        assert text in card
    assert "more steps than back-propagation" in card
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B")' in card
    assert "agzo-edge generate" in card


def test_a_missing_fact_leaves_its_line_and_an_empty_table_its_title_out() -> None:
    card = model_card({"base_model": "Qwen/Qwen3-8B", "loss_after": None})
    assert "loss" not in card.split("## ")[2]
    assert "## Result" not in card
    assert "## Settings" not in card
    assert "None" not in card
    assert "# LoRA adapter\n" in model_card({})


def test_only_a_quantized_base_is_said_to_have_been_quantized() -> None:
    assert "as it was quantized" in model_card(FACTS)
    assert "as it was quantized" not in model_card({**FACTS, "quantization": "none"})


def test_a_directory_is_told_by_its_last_name_only_and_is_no_hub_id() -> None:
    card = model_card({**FACTS, "base_model": "/home/somebody/models/tiny"})
    assert "somebody" not in card
    assert "base_model" not in _front_matter(card)
    assert "`tiny`" in card
    assert "C:" not in model_card({"data_file": "C:\\Users\\somebody\\notes.jsonl"})


def test_no_text_breaks_out_of_its_table() -> None:
    assert "| text | `a\\|b c` |" in model_card(FACTS)
    hostile = model_card({"base_model": 'x/y"\nevil: true', "data_file": "`|`\n# title"})
    assert "evil" not in _front_matter(hostile)
    assert "\n# title" not in hostile


def test_a_guided_run_says_that_it_used_the_error_at_the_head() -> None:
    said = "the error at the model's head"
    assert said in model_card(FACTS | {"settings": {"guide": "head"}})
    assert said not in model_card(FACTS | {"settings": {"guide": "none"}})
