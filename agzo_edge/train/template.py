"""Token ids and label masks of a row: which tokens the model sees, and which of them it learns.

A conversation goes through the tokenizer's chat template. Where the template marks what the assistant
generates ({% generation %}), the marks are the labels; elsewhere each assistant turn is what the
template adds to the conversation before it, from the point where the model would begin to write.
Prompt and completion are told apart as in TRL: the prompt is tokenised alone and with what follows it,
and the labels begin where the two part.

The token at position t is predicted from those before it, so position 0 is never a label.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from agzo_edge.errors import DataError
from agzo_edge.train.formats import Format

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class TokenRow:
    """One row of a forward pass."""

    input_ids: NDArray[np.int64]  # (tokens,)
    is_label: NDArray[np.bool_]  # (tokens,)


def token_rows(
    fields: Mapping[str, Any],  # as `formats.row_faults` passed them
    row_format: Format,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_prompt: bool,  # False learns prompts too; options are scored without theirs in any case
) -> tuple[TokenRow, ...]:  # one, or one for each option
    """A row as tokens. Raises DataError, without a place, when the template refuses the row."""
    if row_format == "choice":
        return _option_rows(fields["prompt"], fields["options"], tokenizer)
    if row_format == "messages":
        row = _conversation_row(fields["messages"], tokenizer)
    elif row_format == "text":
        row = _completed_row("", fields["text"], tokenizer)
    elif row_format == "alpaca":
        row = _alpaca_row(fields, tokenizer)
    else:
        row = _completed_row(fields["prompt"], fields["completion"], tokenizer)
    return (row if mask_prompt else _row(row.input_ids, labels_from=0),)


def _row(input_ids: Sequence[int] | NDArray[np.int64], *, labels_from: int) -> TokenRow:
    is_label = np.arange(len(input_ids)) >= max(labels_from, 1)
    return TokenRow(np.asarray(input_ids, dtype=np.int64), is_label)


def _completed_row(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Prompt and completion with an EOS after them; everything is a label when there is no prompt."""
    prompt_ids, ids = _token_ids([prompt, prompt + completion], tokenizer)
    eos_id = tokenizer.eos_token_id
    if eos_id is not None and ids[-1:] != [eos_id]:
        ids = [*ids, eos_id]
    return _row(ids, labels_from=_n_shared(prompt_ids, ids) if prompt else 0)


def _option_rows(prompt: str, options: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[TokenRow, ...]:
    """The prompt with each option; scored from the first token that is not the same in all of them.

    One boundary for all options: where an option's first letters merge with the prompt's last token,
    the other options are scored from that token too, or the sums would not be of the same event.
    """
    prompt_ids, *rows = _token_ids([prompt, *(prompt + option for option in options)], tokenizer)
    for i, ids in enumerate(rows):
        if ids in rows[:i]:
            alike = f"options {rows.index(ids)} and {i}"
            raise DataError(f"{alike} are the same tokens: no model can tell them apart")
    start = min(_n_shared(prompt_ids, ids) for ids in rows)
    if any(len(ids) <= max(start, 1) for ids in rows):
        raise DataError("an option adds no token to the prompt: no score can be taken of it")
    return tuple(_row(ids, labels_from=start) for ids in rows)


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


def _n_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """How many leading items two sequences have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(first), len(second)))


def _alpaca_row(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """Instruction and output as one exchange; with Stanford's headings where there is no chat template."""
    instruction, given, output = fields["instruction"], fields.get("input") or "", fields["output"]
    if tokenizer.chat_template:
        question = f"{instruction}\n\n{given}" if given else instruction
        exchange = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return _conversation_row(exchange, tokenizer)
    headings = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
    return _completed_row(f"{headings}### Response:\n", output, tokenizer)


def require_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Nothing; raises DataError when the tokenizer cannot lay out a source's conversations."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{source}: rows of messages need a chat template, and this model's tokenizer has none: "
            "give prompt and completion instead, or take a chat model"
        )


def _conversation_row(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    """A conversation in the tokenizer's template, every assistant turn a label."""
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    try:
        if _GENERATION_MARK.search(tokenizer.get_chat_template()):
            return _marked_row(messages, tokenizer)
        return _prefix_row(messages, tokenizer)
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # raise_exception() of a template, mostly
        raise DataError(f"the chat template refuses this conversation: {error}") from None


def _marked_row(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    is_label = np.asarray(encoded["assistant_masks"], dtype=np.bool_)
    is_label[:1] = False
    return TokenRow(np.asarray(encoded["input_ids"], dtype=np.int64), is_label)


def _prefix_row(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> TokenRow:
    text = _rendered(messages, tokenizer)
    spans = [
        _turn_span(messages, i, text, tokenizer) for i, message in enumerate(messages) if message["role"] == "assistant"
    ]
    edges = [edge for span in spans for edge in span]
    # A template writes its own BOS, so none is added; special tokens in the text are recognised all the same.
    texts = [text, *(text[:edge] for edge in edges)]
    ids, *parts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    bounds = [_n_shared(part, ids) for part in parts]  # in tokens
    is_label = np.zeros(len(ids), dtype=np.bool_)
    for start, end in zip(bounds[0::2], bounds[1::2], strict=True):
        is_label[max(start, 1) : end] = True
    return TokenRow(np.asarray(ids, dtype=np.int64), is_label)


def _turn_span(
    messages: Sequence[Message], turn: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Where in `text`, the whole conversation, an assistant turn begins and ends, in characters.

    Some templates write a turn otherwise once others follow it (Qwen3 leaves out an empty thought);
    the turn is then looked for by its content and what the template puts behind that.
    """
    if not text.startswith(_rendered(messages[:turn], tokenizer)):
        raise DataError(
            f"the chat template rewrites what stands before message {turn + 1} once more follows: "
            "give prompt and completion, one row for each turn"
        )
    opened = _rendered(messages[:turn], tokenizer, add_generation_prompt=True)
    until = _rendered(messages[: turn + 1], tokenizer)
    start = _n_shared(opened, text)
    if text.startswith(until):
        return start, len(until)
    content = until.rfind(messages[turn]["content"].strip())
    if content >= 0 and text.startswith(until[content:], start):
        return start, start + len(until) - content
    raise DataError(
        f"the chat template changes the text of message {turn + 1}, so its end cannot be found: "
        "give prompt and completion, one row for each turn"
    )


def _rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **settings: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    assert isinstance(text, str)
    return text
