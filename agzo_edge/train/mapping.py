"""Rows of any fields, made into rows of a known format by a few lines of configuration.

prompt_template = "{premise} Question: {hypothesis} True or false? Answer:"
options = [" true", " false"]                  # for every row; they may name fields as well
answer_field = "label"                         # an index, an option, or one of the labels
labels = ["entailment", "not_entailment"]      # the answer's values, in the order of the options
"""

from collections.abc import Mapping, Sequence
from typing import Any

from agzo_edge.data_config import DataConfig
from agzo_edge.errors import DataError
from agzo_edge.templates import filled, spelled
from agzo_edge.train.rows import BrokenRow, RawRow

ANSWER = "answer"  # the field of it, where no setting names one
_CONVERSATIONS = ("messages", "conversations")  # a template's prompt stands in their place


def mapped_row(row: RawRow, config: DataConfig) -> RawRow | BrokenRow:
    """The row with the fields that the configuration makes from its own; broken when it lacks one."""
    try:
        made = _made_fields(row.fields, config)
    except KeyError as missing:
        found = ", ".join(map(repr, row.fields)) or "(none)"
        name = missing.args[0]
        how = (
            "--answer-field names another" if name == ANSWER and config.answer_field is None else "the settings name it"
        )
        return BrokenRow(row.place, f"{name!r} is missing or null ({how}); the row has {found}")
    except DataError as error:
        return BrokenRow(row.place, str(error))
    if not made:
        return row
    kept = {name: value for name, value in row.fields.items() if name not in _CONVERSATIONS}
    return RawRow(row.place, kept | made)


def _made_fields(fields: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """What the templates give for a row. Raises KeyError for a field that the row lacks."""
    templates = {"prompt": config.prompt_template, "completion": config.completion_template}
    made: dict[str, Any] = {name: filled(text, fields) for name, text in templates.items() if text is not None}
    if config.options is not None:
        made["options"] = [filled(option, fields) for option in config.options]
    if config.answer_field is not None or config.labels is not None:
        field = config.answer_field or ANSWER
        if fields.get(field) is None:
            raise KeyError(field)
        made["answer"] = _answer(fields[field], config.labels)
    return made


def _answer(value: Any, labels: Sequence[str] | None) -> Any:
    """The index of a label, or the value itself where there are no labels. Raises DataError for no label."""
    if labels is None:
        return value
    if spelled(value) not in labels:
        raise DataError(f"the answer {spelled(value)!r} is none of the labels {', '.join(labels)}")
    return labels.index(spelled(value))
