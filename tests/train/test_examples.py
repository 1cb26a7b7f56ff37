import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from character_tokens import CHATML, CHATML_MARKED
from helpers import loaded_apart
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from agzo_edge.config import RunConfig
from agzo_edge.errors import DataError
from agzo_edge.train.data import ExampleSet, longest_examples
from agzo_edge.train.examples import load_examples

Jsonl = Callable[..., str]


def load(source: str, tokenizer: Tokenizer, **settings: Any) -> ExampleSet:
    return load_examples(source, tokenizer, RunConfig(**{"max_seq_length": 64, **settings}))


def test_the_report_counts_rows_and_tokens(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    data = load(jsonl({"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcd"}), tokenizer)
    report = data.report
    assert (report.format, report.rows_read, report.rows_used) == ("prompt-completion", 2, 2)
    assert (report.rows_truncated, report.rows_dropped) == (0, 0)
    assert (report.label_tokens, report.longest_tokens) == (2 + 4, 6)  # with EOS; with BOS and EOS
    assert [example.place for example in data.examples] == ["notes.jsonl:1", "notes.jsonl:2"]


def test_an_example_of_choice_has_a_row_for_each_option(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl({"prompt": "?", "options": ["a", "b", "c"], "answer": "b"})
    (example,) = load(source, tokenizer, objective="choice").examples
    assert len(example.rows) == 3
    assert example.answer == 1


def test_the_hash_is_of_what_is_learned(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    first = load(jsonl({"prompt": "ab", "completion": "c"}), tokenizer).sha256
    assert load(jsonl("", {"completion": "c", "prompt": "ab", "id": 3}), tokenizer).sha256 == first
    assert load(jsonl({"prompt": "a", "completion": "bc"}), tokenizer).sha256 != first  # the mask alone differs
    assert load(jsonl({"prompt": "ab", "completion": "d"}), tokenizer).sha256 != first


def test_all_faults_come_at_once_in_the_order_of_the_lines(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl({"text": "a"}, "{broken", {"text": ""}, {"text": "a" * 100}, {"text": "b"}, {"prompt": "c"})
    with pytest.raises(DataError) as caught:
        load(source, tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{source}: 4 of 6 rows cannot be used:"
    assert [line.split(": ")[0].strip() for line in lines[1:5]] == [f"notes.jsonl:{n}" for n in (2, 3, 4, 6)]
    assert lines[3] == "  notes.jsonl:4: more than 64 tokens"
    assert lines[5:] == ["the longest has 102 tokens: --max-seq-length 102, or --overlong truncate or drop"]


def test_twenty_faults_are_shown_and_the_rest_counted(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        load(jsonl(*(" " * n + "{broken" for n in range(1234))), tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("1,234 of 1,234 rows cannot be used:")
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  ... and 1,214 more"


def test_truncation_takes_the_end_of_a_row_and_is_counted(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl({"prompt": "abc", "completion": "defgh"}, {"prompt": "a", "completion": "b"})
    data = load(source, tokenizer, max_seq_length=6, overlong="truncate")
    assert tokenizer.decode(data.examples[0].rows[0].input_ids) == "<s>abcde"
    assert data.examples[0].label_tokens == 2
    assert (data.report.rows_truncated, data.report.rows_used, data.report.longest_tokens) == (1, 2, 6)


def test_truncation_takes_the_start_of_a_choice_prompt_and_keeps_bos(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl({"prompt": "abcdef", "options": ["xyz", "w"], "answer": 0})
    data = load(source, tokenizer, objective="choice", max_seq_length=6, overlong="truncate")
    rows = data.examples[0].rows
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["<s>efxyz", "<s>efw"]
    assert [int(row.is_label.sum()) for row in rows] == [3, 1]
    with pytest.raises(DataError, match=r"notes.jsonl:1: an answer alone has 3 tokens: no prompt would be left of 4"):
        load(source, tokenizer, objective="choice", max_seq_length=4, overlong="truncate")


def test_dropped_rows_are_counted(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    data = load(jsonl({"text": "a" * 99}, {"text": "b"}), tokenizer, overlong="drop")
    assert [example.place for example in data.examples] == ["notes.jsonl:2"]
    assert (data.report.rows_read, data.report.rows_used, data.report.rows_dropped) == (2, 1, 1)


def test_a_row_without_a_label_is_an_error_unless_it_may_be_dropped(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = CHATML
    mute, talk = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hi"}]
    talk.append({"role": "assistant", "content": "Ho"})
    source = jsonl({"messages": talk}, {"messages": mute})
    for overlong in ("error", "truncate"):
        with pytest.raises(DataError, match=r"notes.jsonl:2: no label token: nothing would be learned"):
            load(source, tokenizer, overlong=overlong)
    assert load(source, tokenizer, overlong="drop").report.rows_dropped == 1
    assert load(source, tokenizer, mask_prompt=False).report.rows_used == 2


def test_truncation_to_the_prompt_alone_is_an_error(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl({"prompt": "abcdef", "completion": "g"})
    with pytest.raises(DataError, match=r"notes.jsonl:1: more than 5 tokens, and none of the first 5 is one to learn"):
        load(source, tokenizer, max_seq_length=5, overlong="truncate")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_an_error(jsonl: Jsonl, tokenizer: Tokenizer, content: str) -> None:
    with pytest.raises(DataError, match=r"notes.jsonl: holds no rows"):
        load(jsonl(content), tokenizer)


def test_a_file_of_which_every_row_was_dropped_is_an_error(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no row is left: all 2 .* longest has 101.* raise --max-seq-length"):
        load(jsonl({"text": "a" * 99}, {"text": "b" * 98}), tokenizer, overlong="drop")


def test_messages_without_a_chat_template_stop_at_once(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    source = jsonl({"messages": talk}, {"messages": talk})
    with pytest.raises(DataError, match=r"notes.jsonl: rows of messages need a chat template"):
        load(source, tokenizer)
    tokenizer.chat_template = CHATML_MARKED
    assert load(source, tokenizer).report.format == "messages"


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "plain"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: text holds bytes that are not UTF-8"):
        load(str(path), tokenizer)


def test_real_instructions_load_with_a_real_tokenizer(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "tiny-novels")
    source = shared_dir / "data" / "instruct_rasbt" / "instruction-data.json"
    data = load(str(source), tokenizer, max_seq_length=1024, overlong="drop")
    assert data.report.format == "alpaca"
    assert data.report.rows_read == 1100
    ends = {int(example.rows[0].input_ids[-1]) for example in data.examples}
    assert ends == {tokenizer.eos_token_id}


def test_the_last_turn_alone_can_be_learned(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    for template in (CHATML, CHATML_MARKED):
        tokenizer.chat_template = template
        row = load(jsonl({"messages": talk}), tokenizer, max_seq_length=99, train_on="last").examples[0].rows[0]
        assert tokenizer.decode(row.input_ids[row.is_label]).strip() == "d<|im_end|>"


def test_the_sample_shows_what_is_read_and_what_is_learned(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    assert load(jsonl({"prompt": "ab", "completion": "cd"}), tokenizer).sample == (("<s>ab", False), ("cd</s>", True))
    choice = jsonl({"prompt": "a", "options": ["b", "c"], "answer": 1})
    assert load(choice, tokenizer, objective="choice").sample == (("<s>a", False), ("c", True))


def test_the_padding_is_that_of_the_steps_to_come(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl({"text": "a"}, {"text": "a" * 5})  # 3 and 7 tokens with BOS and EOS
    report = load(source, tokenizer, batch_size=2, max_steps=3).report
    assert report.tokens == 10
    assert report.padding_share == round(1 - 10 / 14, 4)
    assert load(source, tokenizer, batch_size=1, max_steps=3).report.padding_share == 0


def test_of_many_rows_some_are_held_back_from_training_and_told(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl(*({"text": f"a row {'x' * (i % 7)}"} for i in range(200)))
    data, whole = load(source, tokenizer), load(source, tokenizer, undo_every=0)
    places = {example.place for example in data.examples}
    held = {example.place for example in data.held_back}
    assert (len(held), data.report.rows_held_back, data.report.rows_used) == (20, 20, 200)
    assert not places & held
    assert places | held == {example.place for example in whole.examples}
    assert data.report.label_tokens == sum(example.label_tokens for example in data.examples)
    assert (len(data.lengths), data.n_bytes, data.most_label_tokens) == (180, whole.n_bytes, whole.most_label_tokens)
    assert data.sha256 == whole.sha256
    assert load_examples(source, tokenizer, RunConfig(), split="test").held_back == []


def test_the_longest_of_what_is_held_back_is_rehearsed(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl(*({"text": "x" * (40 if i == 0 else 5)} for i in range(160)))
    data = load(source, tokenizer)
    assert data.held_back[0].place == longest_examples(data, 1)[0].place == "notes.jsonl:1"


def test_settings_make_rows_of_other_fields(jsonl: Jsonl, tokenizer: Tokenizer) -> None:
    source = jsonl({"q": "x", "label": "neg"}, {"q": "y", "label": "pos"}, {"q": "z", "label": "?"})
    settings = {"prompt_template": "{q}=", "options": ("bad", "good"), "labels": ("neg", "pos")}
    with pytest.raises(DataError, match=r"notes.jsonl:3: the answer '\?' is none of the labels neg, pos"):
        load(source, tokenizer, objective="choice", answer_field="label", **settings)
    source = jsonl({"q": "x", "label": "neg"}, {"q": "y", "label": "pos"})
    data = load(source, tokenizer, objective="choice", answer_field="label", **settings)
    assert [example.answer for example in data.examples] == [0, 1]
    assert data.sample == (("<s>x=", False), ("bad", True))


def test_what_many_short_rows_take_is_what_the_plan_counts(tmp_path: Path) -> None:
    """Of such rows most is Python's objects; in a process of its own, whose heap has nothing to give back."""
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": f"a cat {i}"}) + "\n" for i in range(100_000)))
    grown_bytes, counted_bytes = loaded_apart(path, "data.n_bytes")
    assert 0.75 * grown_bytes < counted_bytes < 1.1 * grown_bytes


def test_the_first_example_is_shown_with_the_blanks_that_it_has(shared_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    source = tmp_path / "a.jsonl"
    source.write_text('{"prompt": "It was", "options": [" terrible", " great"], "answer": 0}\n')
    sample = load_examples(str(source), tokenizer, RunConfig(objective="choice")).sample
    assert [text for text, learned in sample if learned] == [" terrible"]
    assert "".join(text for text, _ in sample).endswith("It was terrible")


def test_rows_that_are_too_long_are_told_once_with_what_helps(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(f'{{"prompt": "{"a" * n}", "completion": "b"}}\n' for n in range(30, 60)))
    config = RunConfig(max_seq_length=16)
    with pytest.raises(DataError, match=r"more than 16 tokens \(and 29 more rows\)") as refusal:
        load_examples(str(source), tokenizer, config)
    assert len(str(refusal.value).splitlines()) == 3
    assert str(refusal.value).endswith("--overlong truncate or drop")
    with pytest.raises(DataError, match=r"none of the first 16 .*(?s:.)*, or --overlong drop$"):
        load_examples(str(source), tokenizer, config.model_copy(update={"overlong": "truncate"}))
