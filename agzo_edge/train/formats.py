"""What the rows of a file are, found from their fields, and what is wrong with each.

    messages            a conversation: [{"role": "user", "content": ...}, ...]
    sharegpt            conversations: [{"from": "human", "value": ...}, ...]
    prompt-completion   two strings, or two lists of messages, of which the second is learned
    alpaca              instruction, output and, where it says something, input
    text                a string, all of it learned
    preference          prompt, chosen and rejected: strings or messages; whole conversations hold their prompt
    prompt              for a reward: a string or messages, and whatever fields the reward reads
    choice              prompt, options (two strings or more) and answer: its index, or the option itself

The first format in this list whose fields a row has is the row's; other fields are ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agzo_edge.data_config import Objective
from agzo_edge.templates import spelled
from agzo_edge.train.rows import RawRow, type_name
from agzo_edge.train.turns import (
    as_messages,
    conversation_faults,
    in_one_text,
    is_left_out,
    string_faults,
    tools_faults,
    turns_faults,
    with_prompt,
)

Format = Literal["messages", "sharegpt", "prompt-completion", "alpaca", "text", "choice", "preference", "prompt"]

_TEMPLATES: Mapping[Objective, str] = {
    "lm": "--prompt-template and --completion-template",
    "choice": "--prompt-template, --options, --answer-field and --labels",
    "preference": "--prompt-template",
    "reward": "--prompt-template",
}
_MAY_BE_MESSAGES = ("messages", "prompt", "completion", "chosen", "rejected")
_SHOWN_FIELDS, _SHOWN_CHARACTERS = 12, 40  # of a row without a format, which may be no table at all

_FIELDS: Mapping[Objective, Mapping[Format, tuple[str, ...]]] = {
    "lm": {
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "prompt-completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": ("text",),
    },
    "choice": {"choice": ("prompt", "options", "answer")},
    "preference": {"preference": ("chosen", "rejected")},
    "reward": {"prompt": ("prompt",)},
}


@dataclass(frozen=True)
class SoundRow:
    """A row whose fields are what its format asks for."""

    place: str
    format: Format
    fields: Mapping[str, Any]


def checked_row(row: RawRow, objective: Objective, *, first: SoundRow | None = None) -> SoundRow | str:
    """The row with its format, or what is wrong with it.

    That is: no known format, not that of the file's `first` row, or fields that cannot be used.
    """
    found = format_of(row.fields, objective)
    if found is None:
        return _no_format(row.fields, objective) if first is None else _lacking(row.fields, objective, first)
    if first is not None and found != first.format:
        return f"a {found} row, but the file began with {first.format} ({first.place}): keep one format in a file"
    sound = SoundRow(row.place, found, _normal(row.fields, found))
    return "; ".join(row_faults(sound)) or sound


def format_of(fields: Mapping[str, Any], objective: Objective) -> Format | None:
    """The format that a row's fields make for an objective; none when some field is missing."""
    for name, needed in _FIELDS[objective].items():
        if all(field in fields for field in needed):
            return name
    return None


def _normal(fields: Mapping[str, Any], row_format: Format) -> dict[str, Any]:
    """The fields as the rest of the program reads them."""
    if row_format == "sharegpt":
        messages = as_messages(fields["conversations"], system=fields.get("system"))
        return {**fields, "messages": in_one_text(messages)}
    texts = {name: in_one_text(fields[name]) for name in _MAY_BE_MESSAGES if name in fields}
    if row_format == "preference" and _holds_prompt(fields):
        return {**fields, **with_prompt(texts["chosen"], texts["rejected"])}
    return {**fields, **texts}


def _holds_prompt(fields: Mapping[str, Any]) -> bool:
    """Whether a pair's answers are whole conversations; UltraFeedback repeats their question as a string."""
    prompt = fields.get("prompt")
    return prompt is None or (isinstance(prompt, str) and isinstance(fields["chosen"], list))


def _no_format(fields: Mapping[str, Any], objective: Objective) -> str:
    choices = "; or ".join(" and ".join(needed) for needed in _FIELDS[objective].values())
    found = ", ".join(repr(name)[:_SHOWN_CHARACTERS] for name in list(fields)[:_SHOWN_FIELDS]) or "(none)"
    fault = f"fields {found}: a row for objective {objective} needs {choices}"
    others = [other for other in _FIELDS if other != objective and format_of(fields, other)]
    if others and not (others == ["reward"] and len(fields) > 1):  # a reward's are in most rows
        return f"{fault} (this one is for --objective {others[0]})"
    return fault + "; rows of other fields are laid out by " + _TEMPLATES[objective]


def _lacking(fields: Mapping[str, Any], objective: Objective, first: SoundRow) -> str:
    missing = [repr(name) for name in _FIELDS[objective][first.format] if name not in fields]
    return f"{' and '.join(missing)} missing; the file began with {first.format} ({first.place})"


def row_faults(row: SoundRow) -> list[str]:
    """What is wrong with a row's fields, all of it; nothing for a row that can be used."""
    fields = row.fields
    if row.format == "prompt-completion" and spelled(fields.get("label")).lower() == "false":  # KTO's
        return ["label is false: this completion would be learned as a good one; leave such rows out"]
    if row.format in ("messages", "sharegpt"):
        name = "messages" if row.format == "messages" else "conversations"
        return conversation_faults(fields["messages"], name=name) + tools_faults(fields)
    if row.format == "choice":
        faults = string_faults("prompt", fields["prompt"])
        return faults + _choice_faults(fields["options"], fields["answer"])
    if row.format == "prompt" and isinstance(fields["prompt"], list):
        return conversation_faults(fields["prompt"], name="prompt") + tools_faults(fields)
    if row.format == "prompt":
        return string_faults("prompt", fields["prompt"])
    if row.format == "preference":
        return _preference_faults(fields)
    if row.format == "prompt-completion" and isinstance(fields["prompt"], list):
        return _exchange_faults(fields["prompt"], fields["completion"]) + tools_faults(fields)
    faults = [fault for name in _FIELDS["lm"][row.format] for fault in string_faults(name, fields[name])]
    if row.format == "alpaca" and has_input(fields):
        faults += string_faults("input", fields["input"])
    return faults


def has_input(fields: Mapping[str, Any]) -> bool:
    """Whether an instruction comes with something to work on: many files have a blank where there is nothing."""
    given = fields.get("input")
    return bool(given.strip() if isinstance(given, str) else given)


def _exchange_faults(prompt: object, completion: object, *, name: str = "completion") -> list[str]:
    """What is wrong with a prompt and a completion that are both messages."""
    faults = conversation_faults(prompt, name="prompt") + turns_faults(completion, name=name)
    if not faults and isinstance(completion, list):
        if completion[0]["role"] != "assistant":
            faults.append(f"{name} begins with a {completion[0]['role']} message; it must be the assistant's")
        if any(is_left_out(message) for message in completion):
            faults.append(f"{name} has a message of weight 0, which only a whole conversation, as messages, may have")
    return faults


def _preference_faults(fields: Mapping[str, Any]) -> list[str]:
    names = ("chosen", "rejected")
    if fields["prompt"] is None:
        return ["prompt is missing or null; only chosen and rejected that are both whole conversations need none"]
    if isinstance(fields["prompt"], list):
        faults = [f for name in names for f in _exchange_faults(fields["prompt"], fields[name], name=name)]
        faults = list(dict.fromkeys(faults)) + tools_faults(fields)  # what is wrong with the prompt, once
    else:
        faults = [fault for name in ("prompt", *names) for fault in string_faults(name, fields[name])]
    if fields["chosen"] == fields["rejected"]:
        faults.append("chosen and rejected are the same")
    return faults


def _choice_faults(options: object, answer: object) -> list[str]:
    if not isinstance(options, list) or len(options) < 2:
        given = f"a list of {len(options)}" if isinstance(options, list) else type_name(options)
        return [f"options is {given}; it must be a list of two strings or more"]
    faults = [fault for i, option in enumerate(options) for fault in string_faults(f"option {i}", option)]
    if not faults and len(set(options)) < len(options):
        faults.append(f"options {options} holds one twice")
    if answer_index(options, answer) is None:
        faults.append(f"answer {answer!r} is not an index from 0 to {len(options) - 1}, nor an option")
    return faults


def answer_index(options: Sequence[str], answer: object) -> int | None:
    """The index of the right option, given as one of the options or as its index; none when it is neither.

    An option that reads as the answer does comes before an index: a table's cell and JSON's number are one answer.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        return None
    if spelled(answer) in options:
        return options.index(spelled(answer))
    indices = [str(index) for index in range(len(options))]
    return indices.index(spelled(answer)) if spelled(answer) in indices else None
