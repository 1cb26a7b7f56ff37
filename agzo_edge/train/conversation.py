"""Token ids and label masks of a conversation, through the tokenizer's chat template.

Where the template marks what the assistant generates ({% generation %}), the marks are the labels;
elsewhere each assistant turn is what the template adds to the conversation before it, from the point
where the model would begin to write. A prompt and a completion that are messages part where their tokens
first differ, as in TRL.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from agzo_edge.errors import DataError
from agzo_edge.train.tokens import TokenRow, labelled_from, n_shared
from agzo_edge.train.turns import Message, is_left_out, without_nulls

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPLIT_UP = "give prompt and completion, one row for each turn"

Tools = Sequence[Any] | None


def require_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Nothing; raises DataError when the tokenizer cannot lay out a source's conversations."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{source}: rows of messages need a chat template, and this model's tokenizer has none: "
            "give prompt and completion instead, or take a chat model"
        )


def conversation_row(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, tools: Tools = None
) -> TokenRow:
    """A conversation, every assistant turn a label. Raises DataError when the template refuses it."""
    messages = _without_nulls(messages)
    with _refusals():
        is_marked = _GENERATION_MARK.search(tokenizer.get_chat_template(tools=tools))
        if is_marked and not any(map(is_left_out, messages)):
            _require_written(messages, _text(messages, tokenizer, tools))
            return _marked_row(messages, tokenizer, tools)
        layout = _Layout(messages, tokenizer, tools)
        _require_written(messages, layout.text)
        return layout.row()


def prompt_ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, tools: Tools = None) -> list[int]:
    """The tokens of a conversation up to where the model would begin to write."""
    with _refusals():
        return _ids(_without_nulls(messages), tokenizer, tools, add_generation_prompt=True)


def exchange_row(
    prompt: Sequence[Message], completion: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, tools: Tools = None
) -> TokenRow:
    """A prompt of messages and the messages that answer it, all of the answer a label."""
    asked = prompt_ids(prompt, tokenizer, tools=tools)
    with _refusals():
        whole = _ids(_without_nulls([*prompt, *completion]), tokenizer, tools)
    return labelled_from(n_shared(asked, whole), whole)


def _without_nulls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A table's missing fields are null, which templates would write out; a call's missing text is empty."""
    return [{"content": "", **without_nulls(message)} for message in messages]


@contextmanager
def _refusals() -> Iterator[None]:
    """A template's complaint, by raise_exception() mostly, as ours."""
    try:
        yield
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from None


def _ids(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools, **settings: bool) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, tokenizer_kwargs={"verbose": False}, **settings
    )
    return list(encoded["input_ids"])


def _text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools, **settings: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **settings)
    assert isinstance(text, str)
    return text


def _require_written(messages: Sequence[Message], text: str) -> None:
    """Raise DataError for a template that leaves out what is to be learned: the last answer, or any call of a tool."""
    said = {
        number: message["content"].rpartition("</think>")[2].strip()
        for number, message in enumerate(messages, start=1)
        if message["role"] == "assistant"
    }
    if said and said[max(said)] not in text:
        raise DataError(f"the chat template does not write the text of message {max(said)}: {_SPLIT_UP}")
    for number, message in enumerate(messages, start=1):
        for call in message.get("tool_calls") or ():
            called = call.get("function", call) if isinstance(call, dict) else {}
            if str(called.get("name")) not in text:
                raise DataError(f"the chat template does not write the call of a tool in message {number}")


def _marked_row(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools) -> TokenRow:
    encoded = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    is_label = np.asarray(encoded["assistant_masks"], dtype=np.bool_)
    is_label[:1] = False
    return TokenRow(np.asarray(encoded["input_ids"], dtype=np.int64), is_label)


def _places_of(character: str, text: str, start: int) -> Iterator[int]:
    """Where a character stands in a text, from `start` on."""
    place = text.find(character, start) if character else -1
    while place >= 0:
        yield place
        place = text.find(character, place + 1)


class _Layout:
    """A conversation laid out by a template without marks; the turns are found by what each one adds."""

    def __init__(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Tools) -> None:
        self.messages = messages
        self.tokenizer = tokenizer
        self.tools = tools
        self.text = self._rendered(len(messages))

    def row(self) -> TokenRow:
        """The conversation's tokens, every assistant turn a label."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        turns = [turn for turn in answers if not is_left_out(self.messages[turn])]
        edges = [edge for turn in turns for edge in self._turn_span(turn)]
        # A template writes its own BOS, so none is added; special tokens in the text are recognised all the same.
        texts = [self.text, *(self.text[:edge] for edge in edges)]
        ids, *parts = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        bounds = [n_shared(part, ids) for part in parts]  # in tokens
        is_label = np.zeros(len(ids), dtype=np.bool_)
        for start, end in zip(bounds[0::2], bounds[1::2], strict=True):
            is_label[max(start, 1) : end] = True
        return TokenRow(np.asarray(ids, dtype=np.int64), is_label)

    def _turn_span(self, turn: int) -> tuple[int, int]:
        """Where in the text an assistant turn begins and ends, in characters.

        Some templates write a turn otherwise once others follow it (Qwen3 leaves out its thought): what stands there
        then is the end of what stood there before.
        """
        before = self._until(turn)
        if not self.text.startswith(before):
            raise DataError(
                f"the chat template rewrites what stands before message {turn + 1} once more follows: {_SPLIT_UP}"
            )
        opened = self._rendered(turn, add_generation_prompt=True)
        until = self._until(turn + 1)
        known = len(before) if opened.startswith(before) else 0
        start = known + n_shared(opened[known:], self.text[known:])
        if self.text.startswith(until):
            return start, len(until)
        for cut in _places_of(self.text[start : start + 1], until, start):
            if self.text.startswith(until[cut:], start):
                return start, start + len(until) - cut
        raise DataError(
            f"the chat template changes the text of message {turn + 1}, so its end cannot be found: {_SPLIT_UP}"
        )

    def _rendered(self, n_messages: int, **settings: bool) -> str:
        """The text of the first messages."""
        return _text(self.messages[:n_messages], self.tokenizer, self.tools, **settings)

    def _until(self, n_messages: int) -> str:
        """The text of the first messages as it is when others follow: Phi-3 puts an EOS after the last."""
        text = self._rendered(n_messages)
        ended = self.tokenizer.eos_token or ""
        return text if self.text.startswith(text) else text.removesuffix(ended)
