from pathlib import Path

import pytest

from agzo_edge.errors import DataError
from agzo_edge.train.rows import Document
from agzo_edge.train.source import Split, read_rows, unused_validation


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train", "train.jsonl"),
        ("validation", "valid.jsonl"),
        ("validation", "validation.jsonl"),
        ("test", "test.jsonl"),
    ],
)
def test_a_directory_gives_the_file_of_its_split(tmp_path: Path, split: Split, name: str) -> None:
    for other in ("train.jsonl", "test.jsonl", name):
        (tmp_path / other).write_text('{"text": "other"}\n')
    (tmp_path / "SOURCE.json").write_text("{}")
    (tmp_path / name).write_text('{"text": "wanted"}\n')
    assert [row.place for row in read_rows(str(tmp_path), split=split)] == [f"{name}:1"]
    assert [row.fields for row in read_rows(str(tmp_path), split=split)] == [{"text": "wanted"}]


def test_what_is_asked_to_be_tested_on_is_a_directorys_held_out_file_where_it_has_no_test(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(DataError, match=r"no test.\* or valid.\* "):
        list(read_rows(str(tmp_path), split="test"))
    (tmp_path / "dev.jsonl").write_text('{"text": "wanted"}\n')
    assert [row.place for row in read_rows(str(tmp_path), split="test")] == ["dev.jsonl:1"]


def test_a_directory_without_the_split_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "train.csv").touch()
    with pytest.raises(DataError, match=r"no valid.\* or validation.\* .* in it \(train.csv\)"):
        list(read_rows(str(tmp_path), split="validation"))


def test_a_downloaded_data_set_is_read_from_its_parts_and_not_its_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "data").mkdir()
    for part in range(2):
        name = f"train-0000{part}-of-00002-b42a775f407cee45.jsonl"
        (tmp_path / "data" / name).write_text(f'{{"text": "part {part}"}}\n')
    (tmp_path / "data" / "validation-00000-of-00001.jsonl").write_text('{"text": "held out"}\n')
    assert [row.fields["text"] for row in read_rows(str(tmp_path), split="train")] == ["part 0", "part 1"]
    assert [row.fields["text"] for row in read_rows(str(tmp_path), split="validation")] == ["held out"]


def test_numbered_files_are_parts_of_one_and_others_are_not(tmp_path: Path) -> None:
    for name in ("part-1.jsonl", "part-2.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    assert [row.fields["text"] for row in read_rows(str(tmp_path), split="train")] == ["part-1.jsonl", "part-2.jsonl"]
    (tmp_path / "part-eval.jsonl").touch()
    with pytest.raises(DataError, match=r"no train.\* in it \(part-1.jsonl, part-2.jsonl, part-eval.jsonl\)"):
        list(read_rows(str(tmp_path), split="train"))


@pytest.mark.parametrize("name", ["validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "valid_0.jsonl"])
def test_held_out_rows_are_never_trained_on_for_want_of_others(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text('{"text": "held out"}\n')
    with pytest.raises(DataError, match=r"no train.\* in it"):
        list(read_rows(str(tmp_path), split="train"))


def test_texts_in_the_hubs_folder_are_no_notes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("of a data set")
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    assert [row.text for row in read_rows(str(tmp_path), split="train") if isinstance(row, Document)] == ["train"]
    assert unused_validation(str(tmp_path)) == tmp_path / "data" / "valid.txt"


def test_the_table_that_makes_a_folder_none_of_notes_is_named(tmp_path: Path) -> None:
    for name in ("a.md", "b.md", "c.txt", "d.txt", "e.txt", "f.txt", "zbudget.csv"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"in it \(zbudget.csv\)"):
        list(read_rows(str(tmp_path), split="train"))


def test_held_out_rows_that_nobody_has_named_are_found(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").touch()
    assert unused_validation(str(tmp_path)) is None
    (tmp_path / "train.jsonl").touch()
    assert unused_validation(str(tmp_path)) == tmp_path / "valid.jsonl"
    assert unused_validation(str(tmp_path / "train.jsonl")) is None


def test_notes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    for name in ("train.md", "test.md", "monday.md"):
        (tmp_path / name).write_text(f"of {name}")
    assert [row.name for row in read_rows(str(tmp_path), split="train")] == ["monday.md", "test.md", "train.md"]
    (tmp_path / "monday.md").unlink()
    assert [row.name for row in read_rows(str(tmp_path), split="train")] == ["train.md"]


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").touch()
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=r"train.csv and train.jsonl both match train.\*: name one"):
        list(read_rows(str(tmp_path), split="train"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/no/such/dir", "a/b/c"])
def test_a_missing_path_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=r"no such file or directory$"):
        list(read_rows(source, split="train"))


def test_a_hub_data_set_that_cannot_be_had_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing: .* train split .* cannot be had from the hub: .*") as caught:
        list(read_rows("nobody/nothing", split="train"))
    assert "\n" not in str(caught.value)
