import json
from collections.abc import Callable
from pathlib import Path

import pytest
from character_tokens import character_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (so that a label can be read), with BOS in front as Llama has it."""
    return character_tokenizer("<s> $A")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows, or lines as they are, to notes.jsonl and gives its path."""

    def write(*rows: object) -> str:
        path = tmp_path / "notes.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write
