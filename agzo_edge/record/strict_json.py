"""JSON as its standard has it, for files that somebody else may have written."""

import json
import math
import re
from typing import Any, NoReturn

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def strict_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises ValueError for what Python's reader lets pass: NaN and Infinity, numbers past float64, a field
    given twice, half a surrogate pair, which no terminal can print, and nesting so deep that it would end the
    recursion; and for anything but an object.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_fields,
            parse_constant=_no_number,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half a surrogate pair, which is no character") from None
    return value


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"gives the field {twice[:80]!r} twice")
    return fields


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"holds {text}, which is no JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"holds {text[:40]}, which no float64 can hold")
    return number
