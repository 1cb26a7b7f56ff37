"""Token ids and labels are those of TRL's own trainer, row by row, in the templates of real model families."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers import tiny_checkpoint
from transformers import PreTrainedTokenizerBase as Tokenizer

from agzo_edge.config import RunConfig
from agzo_edge.train.examples import load_examples

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

FAMILIES = ("qwen2_5", "qwen3", "llama3", "gemma", "phi3")
ALIKE = ("qwen2_5", "llama3", "gemma", "phi3")  # whose template writes a turn the same whatever follows it
TALK = [
    [
        {"role": "user", "content": "Who is there?"},
        {"role": "assistant", "content": "It is the night."},
        {"role": "user", "content": "And now?\n\nTell me!"},
        {"role": "assistant", "content": "Now it is the day, 3 o'clock."},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
]
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}


@pytest.fixture
def tokenizer(shared_dir: Path) -> Tokenizer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_dir / "models" / "tiny-novels")
    tokenizer.bos_token = "<|endoftext|>"  # some templates write one
    return tokenizer


def template_of(family: str, *, marked: bool) -> str:
    name = f"{family}_training.jinja" if marked else f"{family}.jinja"
    return (Path(trl.__file__).parent / "chat_templates" / name).read_text(encoding="utf-8")


def of_trl(
    rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, folder: Path, **settings: Any
) -> list[tuple[list[int], list[bool]]]:
    """Ids and labels that SFTTrainer trains on; position 0 is predicted from nothing, so it counts as no label."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")),
            args=trl.SFTConfig(
                output_dir=str(folder / "trl"), use_cpu=True, report_to=[], max_length=None, bf16=False, **settings
            ),
            train_dataset=datasets.Dataset.from_list(list(rows)),
            processing_class=tokenizer,
        )
    prepared = []
    for row in trainer.train_dataset:
        labels = row.get("labels", row["input_ids"])
        prepared.append((list(row["input_ids"]), [i > 0 and label != -100 for i, label in enumerate(labels)]))
    return prepared


def of_ours(rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, folder: Path) -> list[tuple[list[int], list[bool]]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    examples = load_examples(str(path), tokenizer, RunConfig(max_seq_length=2048)).examples
    return [(example.rows[0].input_ids.tolist(), example.rows[0].is_label.tolist()) for example in examples]


@pytest.mark.parametrize("family", FAMILIES)
def test_messages_in_a_marked_template(tokenizer: Tokenizer, tmp_path: Path, family: str) -> None:
    tokenizer.chat_template = template_of(family, marked=True)
    rows = [{"messages": messages} for messages in TALK]
    assert of_ours(rows, tokenizer, tmp_path) == of_trl(rows, tokenizer, tmp_path, assistant_only_loss=True)


@pytest.mark.parametrize("family", ALIKE)
def test_messages_in_a_template_without_marks(tokenizer: Tokenizer, tmp_path: Path, family: str) -> None:
    """TRL then takes its own, marked copy of the template; what ends a turn may differ by a line break, or an EOS."""
    tokenizer.chat_template = template_of(family, marked=False)
    rows = [{"messages": messages} for messages in TALK]
    ends = {*tokenizer("\n")["input_ids"], tokenizer.eos_token_id}
    theirs = of_trl(rows, tokenizer, tmp_path, assistant_only_loss=True)
    for (ids, labels), (trl_ids, trl_labels) in zip(of_ours(rows, tokenizer, tmp_path), theirs, strict=True):
        assert ids == trl_ids
        assert {token for token, a, b in zip(ids, labels, trl_labels, strict=True) if a != b} <= ends


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_as_messages(tokenizer: Tokenizer, tmp_path: Path, family: str) -> None:
    tokenizer.chat_template = template_of(family, marked=True)
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in TALK]
    assert of_ours(rows, tokenizer, tmp_path) == of_trl(rows, tokenizer, tmp_path)


def test_sharegpt_is_messages(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = template_of("qwen2_5", marked=True)
    names = {"user": "human", "assistant": "gpt"}
    rows = [
        {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]}
        for messages in TALK
    ]
    as_messages = [{"messages": messages} for messages in TALK]
    assert of_ours(rows, tokenizer, tmp_path) == of_trl(as_messages, tokenizer, tmp_path, assistant_only_loss=True)


def test_tools_stand_in_the_system_message(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = template_of("qwen2_5", marked=True)
    rows = [{"messages": TALK[1], "tools": [TOOL]}]
    ours = of_ours(rows, tokenizer, tmp_path)
    assert ours == of_trl(
        [{"messages": TALK[1], "tools": json.dumps([TOOL])}], tokenizer, tmp_path, assistant_only_loss=True
    )
    assert '"look"' in tokenizer.decode(ours[0][0])


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "Once upon a time."}, {"text": "Lily saw a big dog!"}],
        [{"prompt": "Once upon a time, Lily saw", "completion": " a big dog."}, {"prompt": "Is th", "completion": "e"}],
    ],
)
def test_plain_rows(tokenizer: Tokenizer, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert of_ours(rows, tokenizer, tmp_path) == of_trl(rows, tokenizer, tmp_path)
