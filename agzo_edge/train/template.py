"""From a row's fields to token ids and label masks: which tokens the model sees, and which it learns.

Prompt and completion are told apart as in TRL: the prompt is tokenised alone and with what follows it,
and the labels begin where the two part. Conversations are in conversation.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from agzo_edge.data_config import PromptForm
from agzo_edge.errors import DataError
from agzo_edge.train.conversation import conversation_row, exchange_row, prompt_ids
from agzo_edge.train.formats import Format, SoundRow, has_input
from agzo_edge.train.tokens import TokenRow, labelled_from, last_labels, n_shared
from agzo_edge.train.turns import is_left_out, tools_of

_FIRST_WORDS, _FIRST_CHARACTERS = 6, 100  # of a text, for the model to go on from
_INPUT = "### Input:\n"


@dataclass(frozen=True)
class Asking:
    """How the rows of a source ask the model, and what one of them asks."""

    form: PromptForm
    prompt: str


def asking_of(row: SoundRow, tokenizer: PreTrainedTokenizerBase) -> Asking:
    """How a row asks; of a text, its first words."""
    fields = row.fields
    if row.format == "text":
        return Asking("plain", " ".join(fields["text"].split()[:_FIRST_WORDS])[:_FIRST_CHARACTERS])
    if row.format == "alpaca":
        form: PromptForm = "chat" if tokenizer.chat_template else "headings"
        return Asking(form, _instruction(fields, heading="" if form == "chat" else _INPUT))
    asked = fields["messages" if row.format in ("messages", "sharegpt") else "prompt"]
    if isinstance(asked, str):
        return Asking("plain", asked)
    return Asking("chat", next((turn.get("content") or "" for turn in asked if turn["role"] == "user"), ""))


def under_headings(instruction: str) -> str:
    """An instruction as Stanford's Alpaca has it, up to where the answer begins."""
    return f"### Instruction:\n{instruction}\n\n### Response:\n"


def token_rows(
    fields: Mapping[str, Any],  # as `formats.row_faults` passed them
    row_format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_prompt: bool,  # False learns prompts too; options are scored without theirs in any case
    train_on: Literal["all", "last"] = "all",  # assistant turns of a conversation
) -> tuple[TokenRow, ...]:  # one, or one for each option or answer
    """A row as tokens. Raises DataError, without a place, when the template refuses the row."""
    if row_format == "choice":
        return _option_rows(fields["prompt"], fields["options"], tokenizer)
    if row_format == "prompt":
        return (_prompt_row(fields, tokenizer),)
    if row_format == "preference":
        return _pair_rows(fields, tokenizer)
    if row_format in ("messages", "sharegpt"):
        row = _conversation(fields, tokenizer, mask_prompt=mask_prompt, train_on=train_on)
    elif row_format == "text":
        row = _completed_row("", fields["text"], tokenizer, ends=not fields.get("goes_on"))
    elif row_format == "alpaca":
        row = _alpaca_row(fields, tokenizer)
    elif isinstance(fields["prompt"], list):
        row = exchange_row(fields["prompt"], fields["completion"], tokenizer, tools=tools_of(fields))
    else:
        row = _completed_row(fields["prompt"], fields["completion"], tokenizer)
    return (row if mask_prompt else labelled_from(0, row.input_ids),)


def _conversation(
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_prompt: bool,
    train_on: Literal["all", "last"],
) -> TokenRow:
    messages = fields["messages"]
    if not mask_prompt and any(map(is_left_out, messages)):
        raise DataError("a message has weight 0, and --no-mask-prompt learns all of them")
    row = conversation_row(messages, tokenizer, tools=tools_of(fields))
    if train_on == "all":
        return row
    last = [turn for turn in messages if turn["role"] == "assistant"][-1:]
    return labelled_from(len(row.input_ids), row.input_ids) if any(map(is_left_out, last)) else last_labels(row)


def _pair_rows(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[TokenRow, ...]:
    """The prompt with the better answer, and with the worse one; the answers are labels, from one boundary."""
    prompt, answers = fields["prompt"], (fields["chosen"], fields["rejected"])
    if isinstance(prompt, list):
        rows = [exchange_row(prompt, answer, tokenizer, tools=tools_of(fields)) for answer in answers]
    else:
        rows = [_completed_row(prompt, answer, tokenizer) for answer in answers]
    if np.array_equal(rows[0].input_ids, rows[1].input_ids):
        raise DataError("chosen and rejected are the same tokens: no model can tell them apart")
    start = min(int(row.is_label.argmax()) for row in rows)
    return tuple(labelled_from(start, row.input_ids) for row in rows)


def needs_chat_template(fields: Mapping[str, Any], row_format: Format) -> bool:
    """Whether a row is messages, which nothing but a chat template can lay out."""
    return row_format in ("messages", "sharegpt") or isinstance(fields.get("prompt"), list)


def _prompt_row(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """A prompt that the model is to answer; nothing of it is a label."""
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        ids = prompt_ids(prompt, tokenizer, tools=tools_of(fields))
    else:
        (ids,) = _token_ids([prompt], tokenizer)
    return labelled_from(len(ids), ids)


def _completed_row(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, *, ends: bool = True) -> TokenRow:
    """Prompt and completion, and an EOS when the text `ends`; everything is a label when there is no prompt."""
    asked, ids = _token_ids([prompt, prompt + completion], tokenizer)
    eos_id = tokenizer.eos_token_id
    if ends and eos_id is not None and ids[-1:] != [eos_id]:
        ids = [*ids, eos_id]
    return labelled_from(n_shared(asked, ids) if prompt else 0, ids)


def _option_rows(prompt: str, options: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[TokenRow, ...]:
    """The prompt with each option, scored from the first token after the prompt.

    One boundary for all options: where an option's first letters merge with the prompt's last token,
    the other options are scored from that token too, or the sums would not be of the same event.
    """
    asked, *rows = _token_ids([prompt, *(prompt + option for option in options)], tokenizer)
    for i, ids in enumerate(rows):
        if ids in rows[:i]:
            alike = f"options {rows.index(ids)} and {i}"
            raise DataError(f"{alike} are the same tokens: no model can tell them apart")
    start = min(n_shared(asked, ids) for ids in rows)
    for i, ids in enumerate(rows):
        if len(ids) <= max(start, 1):
            raise DataError(f"option {i} adds no token to the prompt, so it has no score: begin options with a space")
    return tuple(labelled_from(start, ids) for ids in rows)


def _token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of texts that begin alike, with the tokenizer's BOS, once, and without an EOS of its own."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = []
    for text, row in zip(texts, tokenizer(list(texts), verbose=False)["input_ids"], strict=True):
        doubled = bos is not None and row[:2] == [bos, bos]  # the text brings its own
        ids = list(row[1:] if doubled else row)
        brought = 1 if eos is not None and text.endswith(tokenizer.eos_token) else 0
        added = eos is not None and len(ids) > 1 and ids[-1 - brought :] == [eos] * (1 + brought)
        rows.append(ids[:-1] if added else ids)
    return rows


def _alpaca_row(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Instruction and output as one exchange; with Stanford's headings where there is no chat template."""
    output = fields["output"]
    if tokenizer.chat_template:
        exchange = [{"role": "user", "content": _instruction(fields)}, {"role": "assistant", "content": output}]
        return conversation_row(exchange, tokenizer)
    return _completed_row(under_headings(_instruction(fields, heading=_INPUT)), output, tokenizer)


def _instruction(fields: Mapping[str, Any], *, heading: str = "") -> str:
    """An instruction with what it is to be done with."""
    instruction: str = fields["instruction"]
    return instruction + (f"\n\n{heading}{fields['input']}" if has_input(fields) else "")
