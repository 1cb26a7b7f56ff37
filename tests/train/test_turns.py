"""Conversations as they are stored: ShareGPT's names, tools, what a call may leave out."""

from typing import Any

import pytest

from agzo_edge.train.formats import SoundRow, checked_row
from agzo_edge.train.rows import RawRow
from agzo_edge.train.turns import as_messages, without_nulls

CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Ho"}


def checked(**fields: Any) -> SoundRow | str:
    return checked_row(RawRow("f:1", fields), "lm")


def test_sharegpt_turns_are_messages() -> None:
    turns = [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    row = checked(conversations=turns)
    assert isinstance(row, SoundRow)
    assert row.format == "sharegpt"
    assert [(m["role"], m["content"]) for m in row.fields["messages"]] == [
        ("system", "a"),
        ("user", "b"),
        ("assistant", "c"),
    ]


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([{"from": "alien", "value": "b"}], "role 'alien'"),
        ([{"from": ["human"], "value": "b"}], "role ['human']"),
        ([{"from": "human"}], "message 1's content is null"),
        ([{"from": "gpt", "value": "b"}], "begins with a user message"),
        ("Hi", "conversations is a string; it must be a list of objects with from and value"),
        (["Hi"], "message 1 is a string"),
    ],
)
def test_a_broken_sharegpt_row_is_told_as_messages_are(turns: object, told: str) -> None:
    assert told in str(checked(conversations=turns))


def test_a_system_beside_sharegpts_turns_comes_first() -> None:
    row = checked(conversations=[{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}], system="Be brief.")
    assert isinstance(row, SoundRow)
    assert row.fields["messages"][0] == {"role": "system", "content": "Be brief."}


def test_fields_that_a_table_fills_with_null_are_no_part_of_a_row() -> None:
    value = {"city": "Rome", "more": None, "list": [{"a": None, "b": 0}, None]}
    assert without_nulls(value) == {"city": "Rome", "list": [{"b": 0}, None]}


def test_messages_under_sharegpts_name_are_taken_as_they_are() -> None:
    assert as_messages([USER], system=None) == [USER]


def test_a_call_needs_no_text_and_anything_else_does() -> None:
    tool = {"role": "tool", "content": "A tree."}
    assert isinstance(checked(messages=[USER, CALL, tool, REPLY]), SoundRow)
    assert isinstance(checked(messages=[USER, {**CALL, "content": None}, tool, REPLY]), SoundRow)
    assert "content is null" in str(checked(messages=[USER, {"role": "assistant"}]))
    assert "tool_calls is a string" in str(checked(messages=[USER, {**CALL, "tool_calls": "look"}]))


@pytest.mark.parametrize(
    ("tools", "told"), [("{", "tools is no JSON"), ('{"a": 1}', "tools is an object"), ([1], "list of objects")]
)
def test_tools_that_are_no_list_of_objects_are_a_fault(tools: object, told: str) -> None:
    assert told in str(checked(messages=[USER, REPLY], tools=tools))


@pytest.mark.parametrize("tools", [None, "", [], '[{"name": "look"}]', [{"name": "look"}]])
def test_tools_may_be_missing_a_list_or_its_text(tools: object) -> None:
    assert isinstance(checked(messages=[USER, REPLY], tools=tools), SoundRow)


def test_a_completion_of_messages_is_the_assistants() -> None:
    assert isinstance(checked(prompt=[USER], completion=[REPLY]), SoundRow)
    assert "completion begins with a user message" in str(checked(prompt=[USER], completion=[USER]))
    assert "completion is a string" in str(checked(prompt=[USER], completion="Ho"))
    assert "prompt is empty" in str(checked(prompt=[], completion=[REPLY]))
