"""Text from a model with its adapter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import torch
from transformers import TextStreamer

from agzo_edge.config import Sampling, sampling_from
from agzo_edge.errors import ModelError
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.model.writing import stop_ids
from agzo_edge.train.data import pad_id_of

Message = Mapping[str, str]


class TextModel:
    """A quantized model with its adapter, ready to write."""

    def __init__(self, model: EdgeModel) -> None:
        self.model = model

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        sampling: Sampling | None = None,
        with_adapter: bool = True,  # False: the model as it was
        ignore_chat_template: bool = False,  # go on from the prompt as it stands
        on_text: Callable[[str], object] | None = None,  # called with the text piece by piece while it is written
        **settings: Any,
    ) -> str:
        """The text that follows `prompt`: plain text, or a conversation for the tokenizer's chat template.

        A model with a chat template answers a plain prompt as a user's message. `settings` are fields of Sampling,
        such as max_new_tokens=64, and win over `sampling`. Raises ModelError for a conversation that is empty, without
        a template, or refused by it, for text that is none, and for a prompt longer than the model's positions;
        ConfigError for a setting that is none or out of its range.
        """
        sampling = sampling_from((sampling or Sampling()).model_dump() | settings)
        ids = self._prompt_ids(prompt, plain=ignore_chat_template or self.model.tokenizer.chat_template is None)
        sampling = self._within_positions(ids.shape[1], sampling)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        mask = torch.ones_like(ids)
        passes = self.model.context.running(mask=mask.bool(), base_only=not with_adapter)
        with torch.no_grad(), torch.random.fork_rng(devices=devices), passes:
            torch.manual_seed(sampling.seed)  # transformers samples from the global generator only
            output = self.model.network.generate(
                input_ids=ids,
                attention_mask=mask,
                streamer=None if on_text is None else _Streamer(self.model.tokenizer, on_text),
                **self._settings(sampling),
            )
        text: str = self.model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()

    def _prompt_ids(self, prompt: str | Sequence[Message], *, plain: bool) -> torch.Tensor:  # (1, tokens)
        _require_text(prompt)
        if not plain:
            ids = self._conversation_ids([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        elif isinstance(prompt, str):
            ids = self.model.tokenizer(prompt, return_tensors="pt").input_ids
        else:
            raise ModelError(
                f"{self.model.source}: without a chat template there is no conversation: give a plain prompt"
            )
        if ids.shape[1] == 0:
            raise ModelError("the prompt is empty, and the tokenizer adds nothing to it: write at least a word")
        if (highest := int(ids.max())) >= (n_words := self.model.vocab_size):
            raise ModelError(f"{self.model.source}: token {highest} of {n_words:,} words: the tokenizer is not its own")
        return ids.to(self.model.device)

    def _conversation_ids(self, messages: Sequence[Message]) -> torch.Tensor:  # (1, tokens)
        """The conversation up to where the model begins to write. Raises ModelError where the template refuses it."""
        try:
            encoded = self.model.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ModelError(f"{self.model.source}: the chat template refuses this conversation: {error}") from None
        ids: torch.Tensor = encoded.input_ids
        return ids

    def _within_positions(self, prompt_tokens: int, sampling: Sampling) -> Sampling:
        """The sampling, its answer cut to the positions that the prompt leaves. Raises ModelError for none."""
        if self.model.positions is None:
            return sampling
        left = self.model.positions - prompt_tokens
        if left < 1:
            raise ModelError(
                f"the prompt has {prompt_tokens:,} tokens, and the model {self.model.positions:,} positions: shorten it"
            )
        return sampling.model_copy(update={"max_new_tokens": min(left, sampling.max_new_tokens)})

    def _settings(self, sampling: Sampling) -> dict[str, object]:
        settings: dict[str, object] = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": sampling.temperature > 0,
            "repetition_penalty": sampling.repetition_penalty,
            "pad_token_id": pad_id_of(self.model.tokenizer),
        }
        if sampling.temperature > 0:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        ends = stop_ids(self.model)
        return settings | ({"eos_token_id": ends} if ends else {})


def _require_text(prompt: str | Sequence[Message]) -> None:
    """Raise ModelError for no message at all, for what is none, and for what came from bytes that are no UTF-8."""
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise ModelError("the prompt is neither a text nor a conversation, which is a list of messages")
    if not messages:
        raise ModelError("the conversation is empty: give at least one message")
    texts = [str(part) for message in messages for part in message.values()]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ModelError("the prompt is no text: it holds half a surrogate pair, or bytes that are no UTF-8") from None


class _Streamer(TextStreamer):
    """Tells the answer's text word by word."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002  # the base's word
        text = text if self.has_begun else text.lstrip()  # as the whole answer is given
        self.has_begun = self.has_begun or bool(text)
        if text:
            self.on_text(text)
