from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.data_config import Objective
from agzo_edge.train.formats import SoundRow, answer_index, checked_row, format_of
from agzo_edge.train.rows import RawRow

TURN = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Ho"}
SYSTEM = {"role": "system", "content": "Be brief."}


def faults_of(*rows: dict[str, Any], objective: Objective = "lm") -> list[str]:
    first: SoundRow | None = None
    faults = []
    for number, fields in enumerate(rows, start=1):
        checked = checked_row(RawRow(f"f:{number}", fields), objective, first=first)
        if isinstance(checked, str):
            faults.append(f"f:{number}: {checked}")
        else:
            first = first or checked
    return faults


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"messages": [TURN, REPLY], "prompt": "Hi"}, "messages"),
        ({"prompt": "a", "completion": "b", "id": 7}, "prompt-completion"),
        ({"instruction": "a", "input": "", "output": "b", "text": "all"}, "alpaca"),
        ({"text": "a"}, "text"),
    ],
)
def test_the_fields_tell_the_format(fields: dict[str, Any], found: str) -> None:
    assert format_of(fields, "lm") == found
    assert faults_of(fields) == []


def test_a_choice_row_is_known_by_its_three_fields() -> None:
    row = {"prompt": "a", "options": ["b", "c"], "answer": 1}
    assert format_of(row, "choice") == "choice"
    assert faults_of(row, objective="choice") == []
    assert "(this one is for --objective choice)" in faults_of(row)[0]
    assert "(this one is for --objective lm)" in faults_of({"text": "a"}, objective="choice")[0]


def test_a_row_of_no_format_is_told_what_it_has_and_what_it_needs() -> None:
    assert faults_of({"answer": "b"}) == [
        "f:1: fields 'answer': a row for objective lm needs messages; or conversations; "
        "or prompt and completion; or instruction and output; or text; rows of other fields are laid out by "
        "--prompt-template and --completion-template"
    ]
    assert "fields (none)" in faults_of({})[0]


def test_every_row_of_another_format_than_the_first_is_named() -> None:
    faults = faults_of({"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"}, {"text": "c"})
    assert faults == ["f:3: a prompt-completion row, but the file began with text (f:1): keep one format in a file"]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("", "text is empty"),
        (" \n", "text is empty"),
        (None, "text is null"),
        (3.5, "text is a number; it must be a string"),
        (["a"], "text is a list"),
        (True, "text is true or false"),
        ("a\0b", "NUL character"),
        ("a\ud83db", "half a surrogate pair"),
        (b"caf\xe9".decode(errors="surrogateescape"), "bytes that are not UTF-8"),
    ],
)
def test_a_string_that_cannot_be_learned_is_a_fault(value: object, fault: str) -> None:
    (message,) = faults_of({"text": value})
    assert message.startswith("f:1: ")
    assert fault in message
    message.encode()  # can be printed


def test_all_faults_of_a_row_are_given_together() -> None:
    assert faults_of({"prompt": "", "completion": None}) == [
        "f:1: prompt is empty; completion is null; it must be a string"
    ]


def test_a_field_that_the_first_row_has_is_missed_by_name() -> None:
    first = SoundRow("f:1", "prompt-completion", {"prompt": "a", "completion": "b"})
    fault = checked_row(RawRow("f:2", {"prompt": "a"}), "lm", first=first)
    assert fault == "'completion' missing; the file began with prompt-completion (f:1)"


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "messages is empty"),
        ("Hi", "messages is a string"),
        (None, "messages is null"),
        (["Hi"], "message 1 is a string"),
        ([TURN, {"role": "robot", "content": "Ho"}], "message 2 has role 'robot'; known are system, user"),
        ([TURN, {"content": "Ho"}], "message 2 has role None"),
        ([TURN, {"role": "assistant", "content": ""}], "message 2's content is empty"),
        ([TURN, {"role": "assistant"}], "message 2's content is null"),
        ([SYSTEM, SYSTEM, TURN, REPLY], "a system message comes first, and once"),
        ([TURN, SYSTEM, REPLY], "a system message comes first"),
        ([REPLY, TURN], "begins with a user message"),
        ([SYSTEM, REPLY], "begins with a user message"),
    ],
)
def test_a_conversation_that_no_template_could_lay_out_is_a_fault(messages: object, fault: str) -> None:
    assert fault in faults_of({"messages": messages})[0]


@pytest.mark.parametrize(
    ("options", "answer", "fault"),
    [
        (["a"], 0, "options is a list of 1"),
        ("ab", 0, "options is a string"),
        (["a", 2], 0, "option 1 is a number"),
        (["a", ""], 0, "option 1 is empty"),
        (["a", "a"], 0, "holds one twice"),
        (["a", "b"], 2, "answer 2 is not an index from 0 to 1, nor an option"),
        (["a", "b"], -1, "answer -1"),
        (["a", "b"], True, "answer True"),
        (["a", "b"], None, "answer None"),
        (["a", "b"], "c", "answer 'c'"),
        (["a", "b"], ["a"], "answer ['a']"),
    ],
)
def test_options_that_cannot_be_scored_are_a_fault(options: object, answer: object, fault: str) -> None:
    (message,) = faults_of({"prompt": "?", "options": options, "answer": answer}, objective="choice")
    assert fault in message


def test_an_answer_is_an_option_before_it_is_an_index() -> None:
    assert answer_index(["no", "yes"], "yes") == 1
    assert answer_index(["no", "yes"], "0") == 0
    assert answer_index(["1", "0"], "0") == 1
    assert answer_index(["no", "yes"], 1) == 1


@given(answer=st.integers(-2, 12), shift=st.integers(0, 2))
def test_a_number_and_its_digits_are_the_same_answer(answer: int, shift: int) -> None:
    options = [str(n + shift) for n in range(10)]  # stars from 1 to 10, say
    assert answer_index(options, answer) == answer_index(options, str(answer))
    if str(answer) in options:
        assert answer_index(options, answer) == options.index(str(answer))


def test_a_sound_row_comes_through_with_place_and_fields() -> None:
    assert checked_row(RawRow("f:1", {"text": "a"}), "lm") == SoundRow("f:1", "text", {"text": "a"})


def test_contents_in_parts_of_text_are_one_text_and_others_are_a_fault() -> None:
    parts = [{"type": "text", "text": "How are "}, {"type": "text", "text": "you?"}]
    row = checked_row(RawRow("f:1", {"messages": [TURN | {"content": parts}, REPLY]}), "lm")
    assert isinstance(row, SoundRow)
    assert row.fields["messages"] == [TURN | {"content": "How are you?"}, REPLY]
    picture = [*parts, {"type": "image", "url": "a.png"}]
    (fault,) = faults_of({"prompt": [TURN | {"content": picture}], "completion": [REPLY]})
    assert "content is a list; it must be a string" in fault


def test_what_is_marked_as_not_to_be_learned_is_not_learned_in_silence() -> None:
    (fault,) = faults_of({"prompt": "Hi", "completion": "Go away", "label": False})
    assert "label is false: this completion would be learned as a good one" in fault
    assert faults_of({"prompt": "Hi", "completion": "Ho", "label": True}) == []
    (fault,) = faults_of({"prompt": [TURN], "completion": [REPLY], "label": "False"})  # of a table
    assert "label is false" in fault
    (fault,) = faults_of({"prompt": [TURN], "completion": [REPLY | {"weight": 0}]})
    assert "completion has a message of weight 0, which only a whole conversation" in fault
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", "weight": 2}]}
    assert "message 2 has weight 2" in faults_of(sharegpt)[0]
    (fault,) = faults_of({"messages": [TURN, REPLY | {"weight": 0.5}]})
    assert "message 2 has weight 0.5; 0 leaves an answer out" in fault


def test_a_row_of_other_fields_is_told_how_they_are_laid_out() -> None:
    (fault,) = faults_of({"prompt": "Hi", "response": "Ho"})
    assert "--prompt-template and --completion-template" in fault
    assert "--objective reward" not in fault
