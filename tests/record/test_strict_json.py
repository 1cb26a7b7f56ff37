"""JSON of strangers."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.record.strict_json import strict_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_an_object_reads_back(fields: dict[str, object]) -> None:
    assert strict_object(json.dumps(fields).encode()) == fields


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b'{"a":NaN}', "no JSON number"),
        (b'{"a":-Infinity}', "no JSON number"),
        (b'{"a":1e999}', "no float64"),
        (b'{"a":1,"b":2,"a":1}', "field 'a' twice"),
        (b'{"a":{"b":1,"b":1}}', "field 'b' twice"),
        (b"[1]", "not a JSON object"),
        (b'{"a":1}{"b":2}', "Extra data"),
        (b'{"a":"\xff"}', "decode"),
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
        (b'{"a":' + b"[" * 200_000, "deeply"),
        (b"", "Expecting value"),
    ],
)
def test_what_the_standard_forbids_is_a_value_error(text: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        strict_object(text)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_value_error(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(strict_object(text), dict)
