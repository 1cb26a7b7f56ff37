"""Built-in rewards, and the process that rewards run in."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.errors import ConfigError, RewardError
from agzo_edge.train.judge import Judge, Question
from agzo_edge.train.rewards import BUILT_IN

NUMBER = r"(-?\d[\d,]*)"


def reward(name: str, text: str, argument: str | None = None, **row: Any) -> float:
    return BUILT_IN[name](argument, "answer")("?", text, row)


def test_an_exact_match_is_all_of_the_answer_or_what_the_pattern_finds_last() -> None:
    assert reward("exact_match", " Rome \n", answer="Rome") == 1
    assert reward("exact_match", "In Rome", answer="Rome") == 0
    assert reward("exact_match", "7 + 11 = 18 eggs", NUMBER, answer="She eats 3.\n#### 18") == 1
    assert reward("exact_match", "18 + 3 = 21", NUMBER, answer="#### 18") == 0
    assert reward("exact_match", "no number", NUMBER, answer="#### 18") == 0
    with pytest.raises(ValueError, match="finds nothing in the answer"):
        reward("exact_match", "18", NUMBER, answer="eighteen")


@given(
    st.lists(st.sampled_from(["cat", "dog", "red"]), max_size=6), st.lists(st.sampled_from(["cat", "red"]), max_size=6)
)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(found: list[str], wanted: list[str]) -> None:
    common, left = 0, list(wanted)
    for word in found:
        if word in left:
            left.remove(word)
            common += 1
    score = reward("f1", "The " + " ".join(found), answer=" ".join(wanted).upper())
    if common == 0:
        assert score == 0
    else:
        precision, recall = common / len(found), common / len(wanted)
        assert score == pytest.approx(2 * precision * recall / (precision + recall))


def test_a_regular_expression_is_looked_for_anywhere() -> None:
    assert reward("regex", "Arr, matey!", r"^Arr\b") == 1
    assert reward("regex", "Hello", r"^Arr\b") == 0


def test_a_text_is_json_that_a_schema_allows(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}))
    told = [reward("json_schema", text, str(schema)) for text in ('{"n": 3}', '{"n": "3"}', "{}", "{", "[" * 9999)]
    assert told == [1, 0, 0, 0, 0]


def test_the_length_is_best_at_the_wished_one() -> None:
    assert [reward("length", "x" * n, "4") for n in (0, 2, 4, 5, 8, 99)] == [0, 0.5, 1, 0.75, 0, 0]


OURS = """
import math, os, time
def fine(prompt, text, row): print("a print is no answer"); return len(text) + row["bonus"]
def raises(prompt, text, row): return 1 / 0
def nan(prompt, text, row): return math.nan
def huge(prompt, text, row): return -(10**400)
def text(prompt, text, row): return "good"
def none(prompt, text, row): pass
def hangs(prompt, text, row): time.sleep(60)
def dies(prompt, text, row): os._exit(7)
def swallows(prompt, text, row): raise SystemExit(3)
"""
QUESTION = Question("?", "abc", {"bonus": 2, "answer": "abc"}, "notes.jsonl:12")


@pytest.fixture
def ours(tmp_path: Path) -> str:
    (tmp_path / "ours.py").write_text(OURS)
    return str(tmp_path / "ours.py")


@pytest.fixture
def opened() -> Iterator[list[Judge]]:
    judges: list[Judge] = []
    yield judges
    for judge in judges:
        judge.close()


def judge_of(opened: list[Judge], spec: str, **settings: Any) -> Judge:
    opened.append(Judge(spec, **{"argument": None, "answer_field": "answer", "timeout_s": 20.0, **settings}))
    return opened[-1]


def test_a_function_of_a_file_judges_every_text_in_order(opened: list[Judge], ours: str) -> None:
    longer = Question("?", "abcdé", {"bonus": 0.5}, "notes.jsonl:13")
    assert judge_of(opened, f"{ours}:fine").rewards([QUESTION, longer]) == [5, 5.5]


def test_a_file_may_have_dataclasses_and_import_what_lies_beside_it(opened: list[Judge], tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("BONUS = 4")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport beside\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def fine(prompt, text, row): return Score(beside.BONUS).value\n"
    )
    assert judge_of(opened, f"{tmp_path / 'mine.py'}:fine").rewards([QUESTION]) == [4]


@pytest.mark.parametrize(("name", "answer"), [("exact_match", None), ("f1", ["abc"]), ("exact_match", {"a": 1})])
def test_an_answer_that_cannot_be_compared_names_the_row(opened: list[Judge], name: str, answer: object) -> None:
    asked = Question("?", "None", {"answer": answer}, "notes.jsonl:12")
    with pytest.raises(RewardError, match=r"notes.jsonl:12: .* the row's answer is .*must be a string or a number"):
        judge_of(opened, name).rewards([asked])


def test_a_function_of_a_module_and_a_built_in_are_named_alike(opened: list[Judge]) -> None:
    assert judge_of(opened, "exact_match").rewards([QUESTION]) == [1]
    with pytest.raises(RewardError, match="raised TypeError"):
        judge_of(opened, "math:sqrt").rewards([QUESTION])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("nan", "returned nan; it must be finite"),
        ("huge", "returned inf; it must be finite"),
        ("text", "returned str 'good'; it must be a number"),
        ("none", "returned NoneType"),
        ("dies", r"ended its process \(exit code 7\)"),
        ("swallows", "raised SystemExit: 3"),
    ],
)
def test_a_reward_that_is_none_names_the_row(opened: list[Judge], ours: str, name: str, told: str) -> None:
    with pytest.raises(RewardError, match=rf"notes.jsonl:12: reward '.*ours.py:{name}' {told}"):
        judge_of(opened, f"{ours}:{name}").rewards([QUESTION])


def test_a_reward_whose_process_was_ended_names_the_row(opened: list[Judge], ours: str) -> None:
    judge = judge_of(opened, f"{ours}:fine")
    assert judge.rewards([QUESTION]) == [5.0]
    judge._process.kill()
    judge._process.wait()
    with pytest.raises(RewardError, match=r"notes.jsonl:12: reward '.*' ended its process \(exit code -9\)"):
        judge.rewards([QUESTION])


def test_a_reward_that_takes_for_ever_is_ended(opened: list[Judge], ours: str) -> None:
    judge = judge_of(opened, f"{ours}:hangs", timeout_s=0.3)
    start_s = time.monotonic()
    with pytest.raises(RewardError, match=r"took longer than 0.3 s: raise --reward-timeout-s"):
        judge.rewards([QUESTION])
    assert time.monotonic() - start_s < 10
    assert judge._process.poll() is not None


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nonsense", "write module:function, file.py:function, or one of exact_match"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("nowhere.py:f", "nowhere.py: no such file"),
        ("math:nothing", "math holds no function 'nothing'"),
        ("regex", "needs a regular expression: --reward-argument"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(spec: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Judge(spec, argument=None, answer_field="answer", timeout_s=1.0)
