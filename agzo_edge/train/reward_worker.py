"""The process that a reward runs in: `python -m agzo_edge.train.reward_worker`.

It reads a line of JSON that names the reward, answers with one, and then answers each question with a line.
What a reward prints goes to stderr. In a process of its own a reward that hangs or crashes takes nothing with it.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, TextIO

from agzo_edge.train.rewards import BUILT_IN, Reward


def reward_of(spec: str, *, argument: str | None, answer_field: str) -> Reward:
    """The reward that `spec` names: a built-in one, "module:function", or "file.py:function".

    Raises whatever its module raises, and ValueError or LookupError for what is no reward.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec](argument, answer_field)
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"write module:function, file.py:function, or one of {', '.join(BUILT_IN)}")
    module = _module_of(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise LookupError(f"{place} holds no function {name!r}")
    reward: Reward = function
    return reward


def _module_of(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # as dataclasses look for it
    sys.path.insert(0, str(path.parent))  # what it imports may lie beside it
    spec.loader.exec_module(module)
    return module


def answer(reward: Reward, question: Mapping[str, Any]) -> dict[str, Any]:
    """The reward of one text, or what was wrong with it."""
    try:
        value = reward(question["prompt"], question["text"], question["row"])
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a reward of the user's raises
        return {"error": f"raised {type(error).__name__}: {error}"}
    if not isinstance(value, Real):
        return {"error": f"returned {type(value).__name__} {str(value)[:80]!r}; it must be a number"}
    try:
        number = float(value)
    except OverflowError:  # of a whole number with more digits than a float has room for
        number = math.inf
    return {"reward": number} if math.isfinite(number) else {"error": f"returned {number}; it must be finite"}


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer every line of `questions` with a line of `answers`, the first line being the reward's name."""

    def write(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    asked = json.loads(questions.readline())
    try:
        reward = reward_of(asked["reward"], argument=asked["argument"], answer_field=asked["answer_field"])
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a module of the user's runs on import
        write({"error": f"{type(error).__name__}: {error}"})
        return
    write({"ready": True})
    for line in questions:
        write(answer(reward, json.loads(line)))


if __name__ == "__main__":
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # from here on a print is no answer
    serve(sys.stdin, stream)
