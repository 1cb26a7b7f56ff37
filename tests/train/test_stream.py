"""Files too large to be held: the same examples as from memory, in bounded memory, and what is checked when."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import loaded_apart
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase as Tokenizer

from agzo_edge.config import RunConfig
from agzo_edge.demo import MODEL_DIR
from agzo_edge.errors import DataError
from agzo_edge.events import DataReady, Finished, Stepped
from agzo_edge.session import training
from agzo_edge.train import examples, row_index, stream
from agzo_edge.train.data import ExampleSet, longest_examples
from agzo_edge.train.examples import load_examples
from agzo_edge.train.order import chosen_examples, examples_of_step
from agzo_edge.train.rows import BrokenRow, RawRow, file_rows
from agzo_edge.train.undo import watched_lines

Jsonl = Callable[..., str]
WORDS = [{"text": "x" * (1 + i % 7)} for i in range(40)]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Callable[..., ExampleSet]:
    """Loads any file as a large one is loaded."""

    def load(source: str, **settings: Any) -> ExampleSet:
        monkeypatch.setattr(examples, "STREAM_BYTES", 1)
        return load_examples(source, tokenizer, RunConfig(**{"batch_size": 4, "max_steps": 20, **settings}))

    return load


lines = st.lists(
    st.sampled_from(["", "\r", " ", "{}", "\ufeff{}", '{"text": "é\u2028"}', '{"text": 1}\r', "{", "[1]"]), max_size=20
)


@given(lines=lines, mark=st.sampled_from([b"", b"\xef\xbb\xbf"]), chunk_bytes=st.integers(1, 40), ends=st.booleans())
def test_an_indexed_row_is_the_row_of_a_reading(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], mark: bytes, chunk_bytes: int, ends: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "indexed.jsonl"
    path.write_bytes(mark + "\n".join(lines).encode() + b"\n" * ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_index, "_CHUNK_BYTES", chunk_bytes)
        index = row_index.row_index(path)
    read = [row for row in file_rows(path) if isinstance(row, RawRow | BrokenRow)]
    indexed = [index.row(line) for line in range(len(index))]
    assert [row for row in indexed if row is not None] == read


def test_what_is_streamed_is_what_would_be_held(load: Any, jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl(*WORDS)
    held = load_examples(source, tokenizer, RunConfig(batch_size=4, max_steps=20))
    streamed = load(source)
    assert not held.report.streamed
    assert streamed.report.streamed
    assert len(streamed.examples) == 40
    for one, other in zip(streamed.examples, held.examples, strict=True):
        assert one.place == other.place
        assert one.rows[0].input_ids.tolist() == other.rows[0].input_ids.tolist()


def test_the_rows_of_the_run_are_counted_and_the_largest_known(load: Any, jsonl: Jsonl) -> None:
    data = load(jsonl(*WORDS), max_steps=3, batch_size=2, undo_every=0)
    config = RunConfig(max_steps=3, batch_size=2, undo_every=0)
    used = {0}.union(*(chosen_examples(data.lengths, step=step, config=config) for step in range(3)))
    assert (data.report.rows_read, data.report.rows_used) == (40, len(used))
    longest = max(len(WORDS[i]["text"]) + 2 for i in used)
    assert data.report.longest_tokens == longest
    assert [len(example.rows[0].input_ids) for example in longest_examples(data, 1)] == [longest]


def test_a_broken_row_that_the_run_uses_is_told_before_it_starts(load: Any, jsonl: Jsonl) -> None:
    source = jsonl(*WORDS[:10], {"text": 3}, *WORDS[11:20], "{broken", *WORDS[21:])
    with pytest.raises(DataError) as caught:
        load(source)
    told = str(caught.value)
    assert "2 of 40 rows cannot be used" in told
    assert "notes.jsonl:11: text is a number" in told
    assert "notes.jsonl:21: broken JSON" in told


def test_a_broken_row_that_is_only_watched_is_told_before_the_start(load: Any, jsonl: Jsonl) -> None:
    small = {"max_steps": 1, "batch_size": 1}
    (last,) = {39} & {*watched_lines(40, RunConfig(**small))}
    assert last not in chosen_examples(load(jsonl(*WORDS), **small).lengths, step=0, config=RunConfig(**small))
    with pytest.raises(DataError, match=r"notes.jsonl:40: text is a number"):
        load(jsonl(*WORDS[:39], {"text": 3}), **small)


def test_beyond_the_rows_looked_at_a_fault_comes_with_its_step(
    load: Any, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHECKED_ROWS", 4)
    data = load(jsonl(*WORDS[:39], {"text": ""}), group_by_length=False, undo_every=0)
    with pytest.raises(DataError, match=r"notes.jsonl:40: text is empty"):
        list(data.examples)


def test_rows_that_nobody_has_seen_are_planned_at_the_limit(
    load: Any, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHECKED_ROWS", 8)
    data = load(jsonl(*WORDS), max_seq_length=64)
    assert not data.report.all_checked
    assert (data.report.rows_used, data.report.longest_tokens) == (8, 64)
    for example in longest_examples(data, 4):
        assert len(example.rows[0].input_ids) == len(example.rows[0].is_label) == 64
        assert not example.rows[0].is_label[0]


def test_what_stands_for_a_dropped_row_is_looked_at_too(load: Any, jsonl: Jsonl) -> None:
    source = jsonl({"text": "a"}, *[{"text": "x" * 90}] * 30, "{broken", {"text": "b"})
    with pytest.raises(DataError, match=r"notes.jsonl:32: broken JSON"):
        load(source, overlong="drop", max_seq_length=20, max_steps=1, batch_size=1)


def test_a_dropped_row_gives_its_place_to_the_next(load: Any, jsonl: Jsonl) -> None:
    rows = [{"text": "x" * 90}, {"text": "a"}, {"text": "x" * 91}]
    data = load(jsonl(*rows), overlong="drop", max_seq_length=20)
    assert [example.place for example in data.examples] == [f"notes.jsonl:{n}" for n in (2, 2, 2)]
    with pytest.raises(DataError, match="no row is left"):
        load(jsonl(rows[0], rows[2]), overlong="drop", max_seq_length=20)


def test_an_empty_large_file_holds_no_rows(load: Any, jsonl: Jsonl) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        load(jsonl("", ""))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """The settings of a short run on a file that is taken for a large one; `broken` is a line of it."""
    monkeypatch.setattr(examples, "STREAM_BYTES", 1)
    source = tmp_path / "large.jsonl"

    def config(out: str, *, broken: int | None = None, **settings: Any) -> RunConfig:
        rows = [{"text": f"The bird number {i} was here." if i != broken else 3} for i in range(99)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths = {"model": str(MODEL_DIR), "data": str(source), "output_dir": str(tmp_path / out)}
        length = {"max_steps": 4, "batch_size": 4, "refresh_every": 2, "max_seq_length": 48}
        return RunConfig(**paths, **length, device="cpu", mu=0.01, **settings)

    return config


def test_a_streamed_run_ends_where_it_does_when_it_is_stopped(tmp_path: Path, config: Any) -> None:
    whole = list(training(config("whole")))
    assert isinstance(whole[-1], Finished)
    assert next(event for event in whole if isinstance(event, DataReady)).train.streamed
    events = training(config("cut"))
    for event in events:
        if isinstance(event, Stepped):
            break
    events.close()
    list(training(config("cut"), resume=True))
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


def test_a_fault_that_comes_with_its_step_leaves_a_checkpoint(
    tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHECKED_ROWS", 4)
    broken = examples_of_step(99, step=2, batch_size=4, seed=0)[-1]
    with pytest.raises(DataError, match=rf"large.jsonl:{broken + 1}: text is a number.*--adapter"):
        list(training(config("run", broken=broken, seed=0, group_by_length=False, undo_every=0)))
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_memory_does_not_grow_with_the_rows_text(tmp_path: Path) -> None:
    """The anonymous memory that loading takes, in a process of its own: 80 MiB of rows, 16 bytes for each."""
    path = tmp_path / "large.jsonl"
    row = json.dumps({"text": "word " * 40}) + "\n"
    n_rows = 90 * 2**20 // len(row)
    path.write_text(row * n_rows)
    grown_bytes, n_found = loaded_apart(path, "len(data.examples)", max_steps=20)
    assert n_found == n_rows
    assert grown_bytes < 40 * 2**20  # chunks, the index and an epoch's order; the rows would take ten times that
