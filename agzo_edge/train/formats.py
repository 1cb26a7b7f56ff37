"""What the rows of a file are, found from their fields, and what is wrong with each.

    messages            a conversation: [{"role": "user", "content": ...}, ...]
    prompt-completion   two strings, of which the second is learned
    alpaca              instruction, output and, where it says something, input
    text                a string, all of it learned
    choice              prompt, options (two strings or more) and answer: its index, or the option itself

The first format in this list whose fields a row has is the row's; other fields are ignored.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agzo_edge.train.rows import BrokenRow, RawRow, type_name

Format = Literal["messages", "prompt-completion", "alpaca", "text", "choice"]
Objective = Literal["lm", "choice"]

_FIELDS: Mapping[Objective, Mapping[Format, tuple[str, ...]]] = {
    "lm": {
        "messages": ("messages",),
        "prompt-completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": ("text",),
    },
    "choice": {"choice": ("prompt", "options", "answer")},
}
_SURROGATE = re.compile("[\ud800-\udfff]")  # no character: a byte that was not UTF-8, or half a pair in JSON
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class SoundRow:
    """A row whose fields are what its format asks for."""

    place: str
    format: Format
    fields: Mapping[str, Any]


def checked_rows(rows: Iterable[RawRow | BrokenRow], objective: Objective) -> Iterator[SoundRow | BrokenRow]:
    """Each row with its format, or broken: no known format, not the file's, or fields that cannot be used."""
    first: SoundRow | None = None
    for row in rows:
        if isinstance(row, BrokenRow):
            yield row
            continue
        found = format_of(row.fields, objective)
        if found is None:
            yield BrokenRow(row.place, _no_format(row.fields, objective))
            continue
        sound = SoundRow(row.place, found, row.fields)
        first = first or sound
        if found != first.format:
            fault = f"a {found} row, but the file began with {first.format} ({first.place})"
            yield BrokenRow(row.place, f"{fault}: keep one format in a file")
        elif faults := row_faults(sound):
            yield BrokenRow(row.place, "; ".join(faults))
        else:
            yield sound


def format_of(fields: Mapping[str, Any], objective: Objective) -> Format | None:
    """The format that a row's fields make for an objective; none when some field is missing."""
    for name, needed in _FIELDS[objective].items():
        if all(field in fields for field in needed):
            return name
    return None


def _no_format(fields: Mapping[str, Any], objective: Objective) -> str:
    choices = "; or ".join(" and ".join(needed) for needed in _FIELDS[objective].values())
    found = ", ".join(map(repr, fields)) or "(none)"
    fault = f"fields {found}: a row for objective {objective} needs {choices}"
    for other in _FIELDS:
        if other != objective and format_of(fields, other):
            fault += f" (this one is for --objective {other})"
    return fault


def row_faults(row: SoundRow) -> list[str]:
    """What is wrong with a row's fields, all of it; nothing for a row that can be used."""
    fields = row.fields
    if row.format == "messages":
        return _message_faults(fields["messages"])
    if row.format == "choice":
        faults = _string_faults("prompt", fields["prompt"])
        return faults + _choice_faults(fields["options"], fields["answer"])
    faults = [fault for name in _FIELDS["lm"][row.format] for fault in _string_faults(name, fields[name])]
    if row.format == "alpaca" and fields.get("input"):
        faults += _string_faults("input", fields["input"])
    return faults


def _string_faults(name: str, value: object) -> list[str]:
    if not isinstance(value, str):
        return [f"{name} is {type_name(value)}; it must be a string"]
    if not value.strip():
        return [f"{name} is empty"]
    if "\0" in value:
        return [f"{name} holds a NUL character"]
    if _SURROGATE.search(value):
        return [f"{name} holds bytes that are not UTF-8, or half a surrogate pair: save the file as UTF-8"]
    return []


def _message_faults(messages: object) -> list[str]:
    if not isinstance(messages, list) or not messages:
        given = "empty" if messages == [] else type_name(messages)
        return [f"messages is {given}; it must be a list of objects with role and content"]
    faults = [fault for i, message in enumerate(messages, start=1) for fault in _turn_faults(message, i)]
    if faults:
        return faults
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        faults.append("a system message comes first, and once")
    if next((role for role in roles if role != "system"), "user") != "user":
        faults.append("a conversation begins with a user message, after the system message if there is one")
    return faults


def _turn_faults(message: object, number: int) -> list[str]:
    if not isinstance(message, dict):
        return [f"message {number} is {type_name(message)}; it must be an object with role and content"]
    faults = []
    if message.get("role") not in _ROLES:
        faults.append(f"message {number} has role {message.get('role')!r}; known are {', '.join(_ROLES)}")
    return faults + _string_faults(f"message {number}'s content", message.get("content"))


def _choice_faults(options: object, answer: object) -> list[str]:
    if not isinstance(options, list) or len(options) < 2:
        given = f"a list of {len(options)}" if isinstance(options, list) else type_name(options)
        return [f"options is {given}; it must be a list of two strings or more"]
    faults = [fault for i, option in enumerate(options) for fault in _string_faults(f"option {i}", option)]
    if not faults and len(set(options)) < len(options):
        faults.append(f"options {options} holds one twice")
    if answer_index(options, answer) is None:
        faults.append(f"answer {answer!r} is not an index from 0 to {len(options) - 1}, nor an option")
    return faults


def answer_index(options: Sequence[str], answer: object) -> int | None:
    """The index of the right option, given as one of the options or as its index; none when it is neither.

    An index may be digits in a string, as in a table's cell; an option that reads so comes first.
    """
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    if isinstance(answer, str) and answer.isdecimal():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    return None
