"""Rows of any fields, mapped by a few settings."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.config import RunConfig
from agzo_edge.templates import filled, pattern_fault, template_fault
from agzo_edge.train.mapping import mapped_row
from agzo_edge.train.rows import BrokenRow, RawRow

ROW = RawRow("f:7", {"sentence": "a { fine } film", "label": "pos", "n": 3, "gone": None})


def mapped(**settings: Any) -> dict[str, Any]:
    row = mapped_row(ROW, RunConfig(**settings))
    assert isinstance(row, RawRow), str(row)
    return dict(row.fields)


def fault(**settings: Any) -> str:
    row = mapped_row(ROW, RunConfig(**settings))
    assert isinstance(row, BrokenRow)
    return str(row)


def test_templates_make_the_fields_of_a_format() -> None:
    fields = mapped(prompt_template="{sentence} It was", completion_template=" {label}, {n} {{times}}")
    assert fields["prompt"] == "a { fine } film It was"
    assert fields["completion"] == " pos, 3 {times}"
    assert fields["sentence"] == ROW.fields["sentence"]  # a reward may read it


def test_without_settings_a_row_stays_as_it_is() -> None:
    assert mapped_row(ROW, RunConfig()) is ROW


def test_a_template_replaces_the_rows_conversation() -> None:
    row = mapped_row(RawRow("f:1", {"messages": [], "text": "a"}), RunConfig(prompt_template="{text}"))
    assert isinstance(row, RawRow)
    assert "messages" not in row.fields


def test_labels_stand_in_the_order_of_the_options() -> None:
    fields = mapped(options=(" bad", " good"), labels=("neg", "pos"), answer_field="label")
    assert (fields["options"], fields["answer"]) == ([" bad", " good"], 1)


def test_options_may_name_the_rows_fields() -> None:
    assert mapped(options=("{sentence}", "{n}"))["options"] == ["a { fine } film", "3"]


def test_what_a_row_lacks_is_named_with_what_it_has() -> None:
    assert fault(prompt_template="{question}?").startswith("f:7: 'question' is missing or null")
    assert "'sentence', 'label'" in fault(prompt_template="{question}?")
    assert "'gone' is missing or null" in fault(completion_template="{gone}")
    assert "'target' is missing or null" in fault(answer_field="target")


def test_an_answer_that_is_no_label_is_a_fault_even_when_it_reads_as_an_index() -> None:
    message = fault(options=("a", "b"), labels=("1", "2"), answer_field="n")
    assert message == "f:7: the answer '3' is none of the labels 1, 2"


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(min_size=1), min_size=3))
def test_a_filled_template_is_the_fields_between_its_words(fields: dict[str, str]) -> None:
    assert filled("x{a} {{{b}}}{c}", fields) == f"x{fields['a']} {{{fields['b']}}}{fields['c']}"


def test_a_field_may_have_a_name_of_several_words() -> None:
    assert template_fault("{Review Text}") == ""
    assert filled("{Review Text}!", {"Review Text": "Good"}) == "Good!"


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{}", "{a", "a}"])
def test_a_template_that_asks_for_more_than_a_field_has_a_fault(template: str) -> None:
    assert template_fault(template)


@pytest.mark.parametrize(("pattern", "told"), [("(", "no regular expression"), (".*", "names no group")])
def test_a_pattern_that_makes_no_fields_has_a_fault(pattern: str, told: str) -> None:
    assert told in pattern_fault(pattern)
