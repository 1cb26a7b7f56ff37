"""The embedded demo: its files are what the scripts write, and the data are fit to measure learning by."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from agzo_edge.config import config_from
from agzo_edge.demo import DATA_DIR, MODEL_DIR, PROMPTS, TRAIN_NAME, VALID_NAME, demo_settings
from agzo_edge.demo.make_data import ANSWER, QUESTIONS_BY_BOAST, SUBJECTS, write_data
from agzo_edge.demo.make_model import write_model

MAX_ROW_TOKENS = 41  # a step's time is proportional to it
MAX_DEMO_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


def exchanges(name: str) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a data file."""
    rows = [json.loads(line)["messages"] for line in (DATA_DIR / name).read_text().splitlines()]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    return [(row[0]["content"], row[1]["content"]) for row in rows]


def test_script_reproduces_the_committed_data_byte_for_byte(tmp_path: Path) -> None:
    write_data(tmp_path)
    for name in (TRAIN_NAME, VALID_NAME):
        assert (tmp_path / name).read_bytes() == (DATA_DIR / name).read_bytes()


def test_script_reproduces_the_committed_model_byte_for_byte(tmp_path: Path, shared_dir: Path) -> None:
    write_model(shared_dir / "models" / "tiny-novels", tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in MODEL_DIR.iterdir()}
    del committed["SOURCE.md"]
    assert written == committed


def test_model_is_the_one_its_source_page_names() -> None:
    digest = hashlib.sha256((MODEL_DIR / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (MODEL_DIR / "SOURCE.md").read_text()


def test_no_held_out_line_is_in_the_training_file() -> None:
    learned = {line for exchange in exchanges(TRAIN_NAME) for line in exchange}
    held_out = {line for exchange in exchanges(VALID_NAME) for line in exchange}
    assert not learned & held_out


def test_no_question_is_asked_twice() -> None:
    questions = [question for name in (TRAIN_NAME, VALID_NAME) for question, _ in exchanges(name)]
    assert len(set(questions)) == len(questions) == 608 + 64


def test_every_answer_names_the_subject_of_its_question() -> None:
    answer_shape = re.compile(ANSWER.format(subject=r"(\w+)", boast=r"\w+"))
    for name in (TRAIN_NAME, VALID_NAME):
        for question, answer in exchanges(name):
            found = answer_shape.fullmatch(answer)
            assert found is not None, answer
            assert found[1] in re.findall(r"\w+", question)


def test_training_file_has_every_subject_and_every_boast() -> None:
    answers = " ".join(answer for _, answer in exchanges(TRAIN_NAME)).split()
    assert {*SUBJECTS, *QUESTIONS_BY_BOAST} <= set(answers)


def test_prompts_shown_are_held_out_questions() -> None:
    assert set(PROMPTS) <= {question for question, _ in exchanges(VALID_NAME)}


def test_subjects_and_boasts_are_whole_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    split = [word for word in (*SUBJECTS, *QUESTIONS_BY_BOAST) if len(tokenizer.encode(f" {word}")) != 1]
    assert split == []


def test_labels_are_exactly_the_answer_and_the_token_that_ends_it(tokenizer: PreTrainedTokenizerBase) -> None:
    for question, answer in exchanges(VALID_NAME):
        row = rendered(tokenizer, question, answer)
        is_label = row["assistant_masks"]
        labels = [token for token, learned in zip(row["input_ids"], is_label, strict=True) if learned]
        assert tokenizer.decode(labels) == f"{answer}<|im_end|>"
        assert labels[-1] == tokenizer.eos_token_id


def test_prompt_of_generation_is_what_stands_before_the_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    question, answer = exchanges(VALID_NAME)[0]
    row = rendered(tokenizer, question, answer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )
    assert row["input_ids"][: row["assistant_masks"].index(1)] == prompt["input_ids"]


def test_rows_are_short(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [*exchanges(TRAIN_NAME), *exchanges(VALID_NAME)]
    assert max(len(rendered(tokenizer, *pair)["input_ids"]) for pair in pairs) <= MAX_ROW_TOKENS


def test_end_of_turn_ends_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    ends = json.loads((MODEL_DIR / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_demo_is_small_enough_to_ship() -> None:
    files = [path for path in DATA_DIR.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_DEMO_BYTES


def test_settings_name_files_that_exist_and_make_a_run() -> None:
    config = config_from(demo_settings())
    for path in (config.model, config.data, config.eval_data):
        assert path is not None
        assert Path(path).exists()


def rendered(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> dict[str, list[int]]:
    """Ids and label mask of one exchange."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return {name: list(values) for name, values in encoded.items()}
