"""Plain text taken apart into rows that fit."""

import gzip
from pathlib import Path

import pytest
from character_tokens import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from agzo_edge.config import RunConfig
from agzo_edge.train import plain
from agzo_edge.train.data import ExampleSet
from agzo_edge.train.examples import load_examples
from agzo_edge.train.plain import text_rows
from agzo_edge.train.rows import MAX_ROW_BYTES, BrokenRow, Document, RawRow

CHARACTERS = character_tokenizer("<s> $A")


def pieces_of(text: str, *, max_tokens: int) -> list[RawRow]:
    rows = text_rows([Document("a.txt", text)], CHARACTERS, max_tokens=max_tokens, line_pattern=None)
    return [row for row in rows if isinstance(row, RawRow)]


def load(source: Path, tokenizer: Tokenizer, **settings: object) -> ExampleSet:
    return load_examples(str(source), tokenizer, RunConfig(**settings))


def test_a_note_that_fits_is_one_row_with_an_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.md").write_text("# Monday\n\nRain.\n")
    (example,) = load(tmp_path / "a.md", tokenizer).examples
    assert tokenizer.decode(example.rows[0].input_ids) == "<s># Monday\n\nRain.</s>"
    assert example.place == "a.md:1"


def test_a_longer_text_breaks_after_a_blank_line_and_ends_once() -> None:
    pieces = pieces_of("one\ntwo\n\nthree\nfour\n", max_tokens=18)
    assert [(row.place, row.fields["text"]) for row in pieces] == [("a.txt:1", "one\ntwo"), ("a.txt:4", "three\nfour")]
    assert [row.fields["goes_on"] for row in pieces] == [True, False]


def test_only_the_last_row_of_a_text_has_an_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("abcd\nefgh\nijkl\n")
    rows = [example.rows[0] for example in load(tmp_path / "a.txt", tokenizer, max_seq_length=8).examples]
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["<s>abcd", "<s>efgh", "<s>ijkl</s>"]


@given(lines=st.lists(st.text("ab ", max_size=9), max_size=30), max_tokens=st.integers(13, 40))
def test_nothing_but_blank_lines_is_lost_and_every_row_fits(lines: list[str], max_tokens: int) -> None:
    pieces = pieces_of("\n".join(lines), max_tokens=max_tokens)
    kept = [part.rstrip() for row in pieces for part in row.fields["text"].split("\n") if part.strip()]
    assert kept == [line.rstrip() for line in lines if line.strip()]
    assert all(len(row.fields["text"]) + 2 <= max_tokens for row in pieces)


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_a_length_without_room_for_a_letter_gives_each_line_a_row(max_tokens: int) -> None:
    assert [row.fields["text"] for row in pieces_of("one\n\ntwo\n", max_tokens=max_tokens)] == ["one", "two"]


def test_a_line_that_does_not_fit_is_several_rows_cut_at_spaces_where_there_are_any() -> None:
    pieces = pieces_of("short\none two three four five\n東京都新宿区西新宿", max_tokens=12)
    assert [(row.place, row.fields["text"]) for row in pieces] == [
        ("a.txt:1", "short\none"),
        ("a.txt:2", "two three"),
        ("a.txt:2", "four five"),
        ("a.txt:3", "東京都新宿区西新宿"),
    ]
    assert [row.fields["text"] for row in pieces_of("東京都新宿区西新宿", max_tokens=8)] == ["東京都", "新宿区西新宿"]


def test_no_row_begins_inside_a_character() -> None:
    for letter in ("e\u0301", "\U0001f468\u200d\U0001f469\u200d\U0001f467"):
        texts = [row.fields["text"] for row in pieces_of(letter * 50, max_tokens=20)]
        assert all(text.startswith(letter[0]) for text in texts)
        assert "".join(texts) == letter * 50
    marks = "\u0301" * 50  # belong to nothing
    assert "".join(row.fields["text"] for row in pieces_of(marks, max_tokens=20)) == marks


@given(text=st.text("ab \n\r", min_size=1, max_size=60), max_tokens=st.integers(3, 12))
def test_every_row_fits_and_no_letter_is_lost(text: str, max_tokens: int) -> None:
    pieces = pieces_of(text, max_tokens=max_tokens)
    assert all(len(row.fields["text"]) + 2 <= max_tokens for row in pieces)
    assert "".join("".join(row.fields["text"].split()) for row in pieces) == "".join(text.split())


def test_lines_that_are_more_tokens_together_than_alone_fit_after_all(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    lines = ["VOLUMNIA:", "Then his good report should have been my son; I"]  # its " I" is one token before a break
    lines.append("therein would have found issue. Hear me profess")
    rows = list(text_rows([Document("a.txt", "\n".join(lines))], tokenizer, max_tokens=64, line_pattern=None))
    assert [row.place for row in rows] == ["a.txt:1", "a.txt:3"]
    assert all(len(tokenizer(row.fields["text"])["input_ids"]) < 64 for row in rows if isinstance(row, RawRow))


@pytest.mark.parametrize("name", ["stories260K", "tiny-novels", "tinystories-chat-3m"])
def test_a_real_text_fits_whatever_the_tokenizer(shared_dir: Path, tmp_path: Path, name: str) -> None:
    text = (shared_dir / "data" / "tinyshakespeare" / "input.txt").read_text()[:30_000]
    with gzip.open(tmp_path / "play.txt.gz", "wt") as file:
        file.write(text)
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / name)
    data = load(tmp_path / "play.txt.gz", tokenizer, max_seq_length=128)
    assert data.report.longest_tokens <= 128
    assert data.report.tokens > 0.75 * 128 * data.report.rows_used  # rows are well filled


def test_a_folder_of_notes_is_read_whole_but_for_what_is_hidden(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("b.md", "a.txt", "deep/c.md", ".obsidian/d.md", "empty.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.md" else f"I am {name}")
    places = [example.place for example in load(tmp_path, tokenizer).examples]
    assert places == ["a.txt:1", "b.md:1", "c.md:1"]


def test_a_line_pattern_makes_a_row_of_each_line() -> None:
    lines = [Document("a.txt", "LOC:city Where is Rome ?\r\n\nnothing\n")]
    pattern = r"(?P<label>[A-Z]+):\S+ (?P<question>.*)"
    rows = list(text_rows(lines, CHARACTERS, max_tokens=9, line_pattern=pattern))
    assert rows[0] == RawRow("a.txt:1", {"label": "LOC", "question": "Where is Rome ?"})
    assert isinstance(rows[1], BrokenRow)
    assert str(rows[1]).startswith("a.txt:3: the line does not match")


def test_lines_that_no_tokenizer_can_take_are_named_and_the_text_is_not_used() -> None:
    text = b"fine\ncaf\xe9\nfine\na\0b\n".decode(errors="surrogateescape") + "x" * MAX_ROW_BYTES
    rows = list(text_rows([Document("a.txt", text)], CHARACTERS, max_tokens=9, line_pattern=None))
    assert [str(row).split(" longer")[0] for row in rows] == [
        "a.txt:2: the line holds bytes that are not UTF-8, or half a surrogate pair: save the file as UTF-8",
        "a.txt:4: the line holds a NUL character, as UTF-16 and files that are no text do: save it as UTF-8",
        "a.txt:5: the line is",
    ]


def test_a_text_of_many_lines_is_measured_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{'ab' * (i % 4)}\n" for i in range(50))
    at_once = pieces_of(text, max_tokens=20)
    monkeypatch.setattr(plain, "_CHARACTERS_AT_ONCE", 9)
    assert pieces_of(text, max_tokens=20) == at_once
