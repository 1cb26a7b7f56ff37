"""Conversations as people store them, and what is wrong with one.

    messages    [{"role": "user", "content": ...}, ...], as transformers and TRL have it
    sharegpt    [{"from": "human", "value": ...}, ...], turned into messages

A content in parts that are all text is that text. An assistant's message may hold `tool_calls` in place of text; one of
`weight` 0, as OpenAI has it, is not learned. A row's `tools`, a list of JSON schemas or that list as JSON text, go to
the chat template.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agzo_edge.errors import DataError
from agzo_edge.train.rows import type_name

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}
_SURROGATE = re.compile("[\ud800-\udfff]")  # no character: a byte that was not UTF-8, or half a pair in JSON

Message = Mapping[str, Any]


def string_faults(name: str, value: object) -> list[str]:
    """What is wrong with a text that is to be learned; nothing for one that can be used."""
    if not isinstance(value, str):
        return [f"{name} is {type_name(value)}; it must be a string"]
    if not value.strip():
        return [f"{name} is empty"]
    return character_faults(name, value)


def character_faults(name: str, value: str) -> list[str]:
    """What is wrong with a text's characters; nothing where a tokenizer can take them all."""
    if "\0" in value:
        return [f"{name} holds a NUL character, as UTF-16 and files that are no text do: save it as UTF-8"]
    if _SURROGATE.search(value):
        return [f"{name} holds bytes that are not UTF-8, or half a surrogate pair: save the file as UTF-8"]
    return []


def as_messages(conversation: object, *, system: object) -> object:
    """ShareGPT's turns as messages, after a row's `system`; anything else stays, and the check says what is wrong."""
    if not isinstance(conversation, list):
        return conversation
    first = [{"role": "system", "content": system}] if system else []
    return first + [_as_message(turn) for turn in conversation]


def _as_message(turn: object) -> object:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = turn["from"]
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": turn.get("value")} | weight


def is_left_out(message: Message) -> bool:
    """Whether a message is not to be learned though it is the assistant's."""
    return message.get("weight") == 0


def in_one_text(messages: object) -> object:
    """Messages whose contents are text where they are parts of text; whatever else is in them stays."""
    return [_in_one_text(message) for message in messages] if isinstance(messages, list) else messages


def _in_one_text(message: object) -> object:
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(parts, list) or not parts:
        return message
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    are_all = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return message | {"content": "".join(map(str, texts))} if are_all else message


def with_prompt(chosen: object, rejected: object) -> dict[str, object]:
    """Two whole conversations as the prompt that they begin with alike, and the two ways it was answered.

    What is no conversation comes out without a prompt, and the check says what is wrong.
    """
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return {"prompt": None, "chosen": chosen, "rejected": rejected}
    pairs = enumerate(zip(chosen, rejected, strict=False))
    parted = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    return {"prompt": chosen[:parted], "chosen": chosen[parted:], "rejected": rejected[parted:]}


def conversation_faults(messages: object, *, name: str = "messages") -> list[str]:
    """What is wrong with a whole conversation."""
    faults = turns_faults(messages, name=name)
    if faults:
        return faults
    assert isinstance(messages, list)
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        faults.append("a system message comes first, and once")
    if next((role for role in roles if role != "system"), "user") != "user":
        faults.append("a conversation begins with a user message, after the system message if there is one")
    return faults


def turns_faults(messages: object, *, name: str) -> list[str]:
    """What is wrong with messages one by one, whatever their order."""
    if not isinstance(messages, list) or not messages:
        given = "empty" if messages == [] else type_name(messages)
        keys = "from and value" if name == "conversations" else "role and content"
        return [f"{name} is {given}; it must be a list of objects with {keys}"]
    return [fault for i, message in enumerate(messages, start=1) for fault in _turn_faults(message, i)]


def _turn_faults(message: object, number: int) -> list[str]:
    if not isinstance(message, dict):
        return [f"message {number} is {type_name(message)}; it must be an object with role and content"]
    faults = []
    if message.get("role") not in ROLES:
        faults.append(f"message {number} has role {message.get('role')!r}; known are {', '.join(ROLES)}")
    if message.get("weight") not in (None, 0, 1):
        faults.append(f"message {number} has weight {message['weight']!r}; 0 leaves an answer out, 1 learns it")
    calls = message.get("tool_calls")
    if calls and not isinstance(calls, list):
        faults.append(f"message {number}'s tool_calls is {type_name(calls)}; it must be a list")
    if calls and not message.get("content"):
        return faults  # the calls are what the assistant says
    return faults + string_faults(f"message {number}'s content", message.get("content"))


def without_nulls(value: Any) -> Any:
    """A value without the fields that are null, at any depth: a table has each row's fields in all rows.

    Source: TRL does the same to a data set's rows (remove_none_values).
    """
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def tools_of(fields: Mapping[str, Any]) -> Sequence[Any] | None:
    """The tools of a row, from a list or from its JSON text; none where there are none.

    Raises DataError, without a place, for what is neither.
    """
    tools = without_nulls(fields.get("tools"))
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools is no JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools is {type_name(tools)}; it must be a list of objects")
    return tools


def tools_faults(fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row's tools."""
    try:
        tools_of(fields)
    except DataError as error:
        return [str(error)]
    return []
