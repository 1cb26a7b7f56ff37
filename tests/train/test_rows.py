import gzip
import json
from pathlib import Path

import pytest

from agzo_edge.errors import DataError
from agzo_edge.train.rows import BrokenRow, RawRow, file_rows

ROWS = [{"prompt": "one", "completion": "two"}, {"prompt": "drei, 3", "completion": "viér\nfive"}]


def write_table(path: Path, text: str) -> list[RawRow | BrokenRow]:
    path.write_text(text, encoding="utf-8")
    return list(file_rows(path))


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path)


def test_all_kinds_of_file_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "c.csv").write_text('prompt,completion\none,two\n"drei, 3","viér\nfive"\n', encoding="utf-8")
    write_parquet(tmp_path / "d.parquet")
    with gzip.open(tmp_path / "e.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "f.json").write_bytes((tmp_path / "a.jsonl").read_bytes())  # lines under a .json name
    for path in sorted(tmp_path.iterdir()):
        assert [row.fields for row in file_rows(path)] == ROWS, path.name


def test_a_place_names_the_line_where_a_row_begins(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", 'text,n\n"one\ntwo",1\n\nthree,2\n')
    assert [row.place for row in table] == ["t.csv:2", "t.csv:5"]
    lines = write_table(tmp_path / "t.jsonl", '\n{"text": "a"}\n\n\n{"text": "b"}')
    assert [row.place for row in lines] == ["t.jsonl:2", "t.jsonl:5"]
    document = write_table(tmp_path / "t.json", '[{"text": "a"}]')
    assert [row.place for row in document] == ["t.json:row 1"]


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"text": "a"}'), ("a.csv", "text\na"), ("a.json", '[{"text": "a"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [row.fields for row in file_rows(tmp_path / name)] == [{"text": "a"}]


def test_broken_lines_are_named_and_the_others_are_read(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"text": ', "[1]", "7", "null", "[" * 100_000, '{"text": "b"}']
    rows = write_table(tmp_path / "t.jsonl", "\n".join(lines))
    assert [row.place for row in rows if isinstance(row, RawRow)] == ["t.jsonl:1", "t.jsonl:7"]
    faults = [str(row) for row in rows if isinstance(row, BrokenRow)]
    assert faults[0] == "t.jsonl:2: broken JSON: Expecting value at column 9"
    assert faults[1].startswith("t.jsonl:3: holds a list")
    assert "a number" in faults[2]
    assert "null" in faults[3]
    assert faults[4].startswith("t.jsonl:6: broken JSON")


def test_a_tsv_keeps_the_quotes_of_its_sentences(tmp_path: Path) -> None:
    rows = write_table(tmp_path / "t.tsv", 'text\tlabel\n" quoted " it said\t1\n"open\t0\n')
    assert [row.fields["text"] for row in rows] == ['" quoted " it said', '"open']


def test_a_table_row_with_a_missing_cell_is_broken(tmp_path: Path) -> None:
    rows = write_table(tmp_path / "t.csv", "prompt,completion\na\nb,c\n")
    assert str(rows[0]) == "t.csv:2: 1 cells, but the first line names 2 columns"
    assert isinstance(rows[1], RawRow)


def test_an_open_quote_in_a_csv_is_named_by_the_line_where_it_opens(tmp_path: Path) -> None:
    rows = write_table(tmp_path / "t.csv", 'text\nfine\n"never closed\nmore\n')
    assert isinstance(rows[0], RawRow)
    assert str(rows[1]).startswith("t.csv:3: not a table's row")


def test_a_cell_can_hold_a_list_as_json(tmp_path: Path) -> None:
    rows = write_table(tmp_path / "t.tsv", 'prompt\toptions\tanswer\nIs it?\t["yes", "no"]\tno\nIs it?\t[yes\t0\n')
    assert [row.fields["options"] for row in rows] == [["yes", "no"], "[yes"]


def test_a_cell_can_hold_messages_and_brackets_that_are_none(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    rows = write_table(tmp_path / "t.tsv", f'prompt\tchosen\n{json.dumps(messages)}\t["a"]\n[1] says\t[]\n')
    assert [row.fields for row in rows] == [
        {"prompt": messages, "chosen": '["a"]'},
        {"prompt": "[1] says", "chosen": "[]"},
    ]


def test_a_cell_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    (row,) = write_table(tmp_path / "t.csv", "\ntext\n" + "a" * 200_000 + "\n")  # and a blank line names no column
    assert len(row.fields["text"]) == 200_000


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.csv:1: column 'text' is named twice"):
        write_table(tmp_path / "t.csv", "text,text\na,b\n")


def test_a_broken_document_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t.json:3: broken JSON"):
        write_table(tmp_path / "t.json", '[\n{"text": "a"},\n{"text": }\n]')


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "whole.parquet")
    half = tmp_path / "half.parquet"
    half.write_bytes((tmp_path / "whole.parquet").read_bytes()[:-50])
    with pytest.raises(DataError, match=r"half.parquet: cannot be read as Parquet"):
        list(file_rows(half))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: cannot be read"):
        list(file_rows(cut))
    cut.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"cut.jsonl.gz: cannot be read: Not a gzipped file"):
        list(file_rows(cut))


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").touch()
    with pytest.raises(DataError, match=r"t.xlsx: .* use one of .jsonl, .json, .csv, .tsv, .parquet, .txt, .md"):
        list(file_rows(tmp_path / "t.xlsx"))


def test_a_line_too_long_to_be_a_row_is_named_and_the_next_one_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with path.open("w") as file:
        file.write('{"text": "a"}\n{"text": "')
        for _ in range(50):
            file.write("x" * 2**20)
        file.write('"}\n{"text": "b"}\n')
    first, long, last = file_rows(path)
    assert [row.place for row in (first, last) if isinstance(row, RawRow)] == ["t.jsonl:1", "t.jsonl:3"]
    assert str(long) == "t.jsonl:2: the line is longer than 16.0 MiB: is this a file of lines?"


def test_a_file_saved_as_utf_16_is_told_from_broken_json(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    assert "as UTF-16 does: save the file as UTF-8" in str(next(iter(file_rows(tmp_path / "t.jsonl"))))


def test_parquet_with_a_date_that_python_has_not_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"when": pyarrow.array([10**7], pyarrow.date32())}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet after row 0: date value out of range"):
        list(file_rows(tmp_path / "t.parquet"))


def test_parquet_with_a_damaged_page_is_told_with_the_rows_before_it(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"line {i}" for i in range(4000)]})
    parquet.write_table(table, tmp_path / "t.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[len(content) // 3 : len(content) // 3 + 400] = b"\xff" * 400
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as Parquet after row 0"):
        list(file_rows(tmp_path / "t.parquet"))


def test_a_spreadsheets_semicolons_stand_between_cells_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufeffprompt;completion\r\n"Hello; you";1,5\r\n', encoding="utf-8")
    assert [row.fields for row in file_rows(tmp_path / "a.csv")] == [{"prompt": "Hello; you", "completion": "1,5"}]
    (tmp_path / "b.csv").write_text("text,note\nA; and B,C\n")
    assert [row.fields for row in file_rows(tmp_path / "b.csv")] == [{"text": "A; and B", "note": "C"}]
    (tmp_path / "c.csv").write_text('\n"text; all of it"\nA; and B\n')
    assert [row.fields for row in file_rows(tmp_path / "c.csv")] == [{"text; all of it": "A; and B"}]
    (tmp_path / "d.csv").write_text('"prompt";"completion, long"\nA;B\n')
    assert [row.fields for row in file_rows(tmp_path / "d.csv")] == [{"prompt": "A", "completion, long": "B"}]
