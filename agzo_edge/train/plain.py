"""Rows from plain text, where nothing says what a row is.

A line pattern makes a row of each line. Without one, a row is as many whole lines as fit a forward pass,
and begins after a blank line where one is near: a note that fits is one row, a novel is many, and a line that does
not fit is several. Only a text's last row ends with an EOS.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from agzo_edge.train.rows import MAX_ROW_BYTES, BrokenRow, Document, RawRow, too_long
from agzo_edge.train.turns import character_faults

_SPECIAL_TOKENS = 2  # BOS and EOS, which a row may get
_CHARACTERS_AT_ONCE = 50_000  # of which a tokenizer takes some 200 bytes each
_BLANKS = " \t\u3000"
_JOINER = "\u200d"  # makes one emoji of two
_MARKS = {"Mn", "Mc", "Me"}  # of Unicode's categories: accents and vowel signs, which belong to the letter before them


def text_rows(
    rows: Iterable[RawRow | BrokenRow | Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    line_pattern: str | None,
) -> Iterator[RawRow | BrokenRow]:
    """The rows, each plain text among them taken apart."""
    for row in rows:
        if not isinstance(row, Document):
            yield row
        elif line_pattern is not None:
            yield from _matched_lines(row, re.compile(line_pattern))
        else:
            yield from _pieces(row, tokenizer, max_tokens=max_tokens)


def _matched_lines(document: Document, pattern: re.Pattern[str]) -> Iterator[RawRow | BrokenRow]:
    """A row for each line that is not blank: the pattern's named groups."""
    for number, line in enumerate(document.text.split("\n"), start=1):
        place, line = f"{document.name}:{number}", line.rstrip("\r")
        if not line.strip():
            continue
        match = pattern.fullmatch(line)
        if match is None:
            yield BrokenRow(place, f"the line does not match the line pattern {pattern.pattern!r}")
        else:
            yield RawRow(place, match.groupdict())


def _pieces(document: Document, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Iterator[RawRow | BrokenRow]:
    """A row for each stretch of lines that fits, or of a line that does not; a text with broken lines gives those."""
    lines = document.text.splitlines(keepends=True)
    if not document.text.strip():
        return
    if broken := list(_broken_lines(document.name, lines)):
        yield from broken
        return
    room = max_tokens - _SPECIAL_TOKENS
    parts = [(number, part) for number, line in enumerate(lines, start=1) for part in _parts(line, room)]
    texts = [part for _, part in parts]
    is_blank = [not text.strip() for text in texts]
    cuts = _cuts(_lengths(texts, tokenizer), is_blank, room=room)
    stretches = [(parts[start][0], "".join(texts[start:end])) for start, end in cuts]
    pieces = [
        (number, text)
        for number, stretch in _fitting(stretches, tokenizer, room=room)
        if (text := stretch.rstrip("\n" if stretch.endswith("\n") else _BLANKS)).strip()
    ]
    for i, (number, text) in enumerate(pieces, start=1):
        yield RawRow(f"{document.name}:{number}", {"text": text, "goes_on": i < len(pieces)})


def _parts(line: str, room: int) -> Iterator[str]:
    """The line, or stretches of it that are well within a row and begin after a blank where one is near."""
    start, size = 0, max(1, room // 2)  # a token is three letters or four, or one
    while len(line) - start > 2 * size and room > 0:
        end = max(line.rfind(blank, start, start + size) for blank in _BLANKS) + 1
        if end <= start:
            end = _character_end(line, start + size)
        yield line[start:end]
        start = end
    yield line[start:]


def _character_end(text: str, at: int) -> int:
    """The first place from `at` on that is not inside a character as people see one; `at` where there is none near."""
    end = at
    while end < len(text) and (
        unicodedata.category(text[end]) in _MARKS or text[end] == _JOINER or text[end - 1] == _JOINER
    ):
        end += 1
    return end if end < len(text) else at


def _broken_lines(name: str, lines: Sequence[str]) -> Iterator[BrokenRow]:
    """The lines that no tokenizer can take."""
    for number, line in enumerate(lines, start=1):
        place = f"{name}:{number}"
        if len(line) >= MAX_ROW_BYTES:
            yield too_long(place)
        else:
            yield from (BrokenRow(place, fault) for fault in character_faults("the line", line))


def _lengths(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of each text."""
    lengths: list[int] = []
    ends = accumulate(map(len, texts))
    for _, part in groupby(zip(ends, texts, strict=True), key=lambda text: text[0] // _CHARACTERS_AT_ONCE):
        some = [text for _, text in part]
        lengths += map(len, tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"])
    return lengths


def _cuts(n_tokens: Sequence[int], is_blank: Sequence[bool], *, room: int) -> Iterator[tuple[int, int]]:
    """The first part and the one after the last, for each piece of at most `room` tokens (a part at least).

    A part is a line, or a stretch of a long one. A piece ends at its last blank part when that leaves it at least half
    full.
    """
    before = np.concatenate([[0], np.cumsum(n_tokens)])  # tokens before each line
    after_blank = np.flatnonzero(is_blank) + 1
    start = 0
    while start < len(n_tokens):
        end = max(start + 1, int(np.searchsorted(before, before[start] + room, side="right")) - 1)
        if end < len(n_tokens):
            blank = int(after_blank[np.searchsorted(after_blank, end, side="right") - 1]) if after_blank.size else 0
            if start < blank <= end and before[blank] - before[start] >= room / 2:
                end = blank
        yield start, end
        start = end


def _fitting(
    pieces: Sequence[tuple[int, str]],  # the number of each one's first line, and its text
    tokenizer: PreTrainedTokenizerBase,
    *,
    room: int,  # tokens
) -> Iterator[tuple[int, str]]:
    """The pieces, divided until each fits: lines together may be more tokens than each by itself, and one too many."""
    for (number, text), n_tokens in zip(pieces, _lengths([text for _, text in pieces], tokenizer), strict=True):
        if n_tokens <= room or room < 1 or len(text) == 1:
            yield number, text
        else:
            n_rows = n_tokens // room + 1
            first, second = _divided(text, at=len(text) * (n_rows // 2) // n_rows)
            yield from _fitting([(number, first), (number + first.count("\n"), second)], tokenizer, room=room)


def _divided(text: str, *, at: int) -> tuple[str, str]:
    """A text in two: after the line break that is nearest to `at`, else after the nearest blank, else there."""
    for marks in ("\n", _BLANKS):
        found = [place for mark in marks for place in (text.rfind(mark, 0, at), text.find(mark, at))]
        if places := [place + 1 for place in found if 0 <= place < len(text) - 1]:
            at = min(places, key=lambda place: abs(place - at))
            return text[:at], text[at:]
    at = _character_end(text, max(at, 1))
    return text[:at], text[at:]
