"""Templates of a row's fields, "Review: {sentence} It was", and patterns that make fields of a line."""

import json
import re
import string
from collections.abc import Mapping
from typing import Any


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """The template with each {name} replaced by the field; what is no string is spelled as JSON.

    Raises KeyError for a field that is not there, or is null.
    """
    text = ""
    for before, name, _, _ in string.Formatter().parse(template):
        text += before
        if name is not None:
            if fields.get(name) is None:
                raise KeyError(name)
            text += spelled(fields[name])
    return text


def spelled(value: Any) -> str:
    """A field's value as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def template_fault(template: str) -> str:
    """Why `template` cannot be filled from a row's fields; empty when it can."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"{error}; write a brace itself twice"
    wrong = [name for name in names if not name or set(".[]") & set(name)]
    return f"{{{wrong[0]}}} is no field's name" if wrong else ""


def pattern_fault(pattern: str) -> str:
    """Why `pattern` cannot make fields of a line; empty when it can."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        return f"no regular expression: {error}"
    return "" if groups else "it names no group; (?P<text>.*) makes a field called text"
