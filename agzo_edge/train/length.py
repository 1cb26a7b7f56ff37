"""Rows that fit: what becomes of one that is longer than a forward pass may be."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from agzo_edge.errors import DataError
from agzo_edge.train.tokens import TokenRow

Overlong = Literal["error", "truncate", "drop"]


def fitted_rows(
    rows: tuple[TokenRow, ...],  # one, or one for each option
    *,
    limit: int,  # tokens
    overlong: Overlong,
    bos_id: int | None,
) -> tuple[TokenRow, ...]:  # empty when the example is dropped; `rows` itself when nothing had to be done
    """The rows of an example, none longer than `limit` and each with a token to learn.

    One row loses its end; options lose the start of their prompt, the same tokens in each.
    Raises DataError, without a place.
    """
    longest = longest_tokens(rows)
    if longest > limit and overlong == "error":
        raise DataError(f"more than {limit:,} tokens")
    if overlong == "drop" and (longest > limit or not all_learn(rows)):
        return ()
    if longest > limit:
        rows = (_without_end(rows[0], limit),) if len(rows) == 1 else _without_start(rows, limit, bos_id)
        if not all_learn(rows):
            raise DataError(f"more than {limit:,} tokens, and none of the first {limit:,} is one to learn")
    if not all_learn(rows):
        raise DataError("no label token: nothing would be learned from this row")
    return rows


def fitted_prompt(row: TokenRow, *, limit: int, overlong: Overlong) -> tuple[TokenRow, ...]:  # empty when dropped
    """A prompt that is to be answered, no longer than `limit` tokens; one that is cut loses its start.

    Raises DataError, without a place.
    """
    if len(row.input_ids) <= limit:
        return (row,)
    if overlong == "error":
        raise DataError(f"more than {limit:,} tokens")
    return (TokenRow(row.input_ids[-limit:], row.is_label[-limit:]),) if overlong == "truncate" else ()


def longest_tokens(rows: Sequence[TokenRow]) -> int:
    """The tokens of the longest row."""
    return max(len(row.input_ids) for row in rows)


def all_learn(rows: Sequence[TokenRow]) -> bool:
    """Whether every row has a label token."""
    return all(bool(row.is_label.any()) for row in rows)


def _without_end(row: TokenRow, limit: int) -> TokenRow:
    return TokenRow(row.input_ids[:limit], row.is_label[:limit])


def _without_start(rows: Sequence[TokenRow], limit: int, bos_id: int | None) -> tuple[TokenRow, ...]:
    prompt_tokens = int(rows[0].is_label.argmax())  # the same for all options
    kept = int(rows[0].input_ids[0] == bos_id)  # a BOS stays: models lean on their first position
    cut = kept + longest_tokens(rows) - limit
    if cut >= prompt_tokens:
        option_tokens = longest_tokens(rows) - prompt_tokens
        raise DataError(f"an answer alone has {option_tokens:,} tokens: no prompt would be left of {limit:,}")
    return tuple(
        TokenRow(
            np.concatenate([row.input_ids[:kept], row.input_ids[cut:]]),
            np.concatenate([row.is_label[:kept], row.is_label[cut:]]),
        )
        for row in rows
    )
