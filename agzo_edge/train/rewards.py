"""Rewards that come with the program: (prompt, text, row) -> number, more is better.

    exact_match   1 where the text is the row's answer; with an argument, where what it finds in both is
    f1            the overlap of words with the row's answer, as in SQuAD
    regex         1 where the argument, a regular expression, is found in the text
    json_schema   1 where the text is JSON that the argument, the file of a schema, allows
    length        1 at the argument, a number of characters, falling to 0 at none and at twice as many

This module runs in the reward's own process, and so imports nothing heavy.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Reward = Callable[[Any, str, Mapping[str, Any]], float]


def exact_match(pattern: str | None, answer_field: str) -> Reward:
    """Whether text and answer are equal; with a pattern, its last match in each (its group where it has one)."""

    def reward(_prompt: Any, text: str, row: Mapping[str, Any]) -> float:
        answer = _answer(row, answer_field)
        if pattern is None:
            return float(text.strip() == answer.strip())
        wanted, found = _last_match(pattern, answer), _last_match(pattern, text)
        if wanted is None:
            raise ValueError(f"the pattern {pattern!r} finds nothing in the answer {answer[-80:]!r}")
        return float(found == wanted)

    return reward


def _answer(row: Mapping[str, Any], field: str) -> str:
    """The row's answer as text. Raises KeyError where there is none, ValueError for what cannot be compared."""
    answer = row[field]
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ValueError(
            f"the row's {field} is {json.dumps(answer, default=str)[:80]}; it must be a string or a number"
        )
    return str(answer)


def _last_match(pattern: str, text: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    return (matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()) if matches else None


def f1(_argument: str | None, answer_field: str) -> Reward:
    """Twice the words in common over all words of text and answer. Source: SQuAD, arXiv 1606.05250, 6.1."""

    def reward(_prompt: Any, text: str, row: Mapping[str, Any]) -> float:
        found, wanted = _words(text), _words(_answer(row, answer_field))
        common = sum((Counter(found) & Counter(wanted)).values())
        return 2 * common / (len(found) + len(wanted)) if common else 0.0

    return reward


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]


def regex(pattern: str | None, _answer_field: str) -> Reward:
    """Whether the pattern is found in the text."""
    compiled = re.compile(_needed(pattern, "regex", "a regular expression"))
    return lambda _prompt, text, _row: float(compiled.search(text) is not None)


def json_schema(schema: str | None, _answer_field: str) -> Reward:
    """Whether the text is JSON that the schema in a file allows."""
    try:
        import jsonschema
    except ImportError:
        raise ValueError("the reward json_schema needs a package more: pip install jsonschema") from None
    path = Path(_needed(schema, "json_schema", "the file of a schema"))
    validator_class = jsonschema.validators.validator_for(content := json.loads(path.read_text(encoding="utf-8")))
    validator_class.check_schema(content)
    validator = validator_class(content)

    def reward(_prompt: Any, text: str, _row: Mapping[str, Any]) -> float:
        try:
            return float(validator.is_valid(json.loads(text)))
        except (ValueError, RecursionError):
            return 0.0

    return reward


def length(characters: str | None, _answer_field: str) -> Reward:
    """How near the text's length is to a number of characters."""
    wanted = int(_needed(characters, "length", "a number of characters"))
    if wanted < 1:
        raise ValueError(f"length {wanted}: give a number of characters from 1 up")
    return lambda _prompt, text, _row: max(0.0, 1 - abs(len(text) - wanted) / wanted)


def _needed(argument: str | None, name: str, what: str) -> str:
    if argument is None:
        raise ValueError(f"the reward {name} needs {what}: --reward-argument")
    return argument


BUILT_IN: Mapping[str, Callable[[str | None, str], Reward]] = {
    "exact_match": exact_match,
    "f1": f1,
    "regex": regex,
    "json_schema": json_schema,
    "length": length,
}
