"""Text from a model with its adapter."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jinja2
import torch
from transformers.generation.streamers import BaseStreamer

from agzo_edge.config import Sampling, sampling_from
from agzo_edge.data_config import PromptForm
from agzo_edge.errors import ModelError
from agzo_edge.model.device import with_threads
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.model.writing import stop_ids
from agzo_edge.train.data import pad_id_of
from agzo_edge.train.template import under_headings

Message = Mapping[str, str]

_HALF_A_CHARACTER = "\ufffd"  # what a tokenizer makes of bytes whose others are yet to come


class TextModel:
    """A quantized model with its adapter, ready to write.

    A prompt that is a text is put in the `form` in which the adapter's rows were; without one by the tokenizer's chat
    template, where it has one.
    """

    def __init__(self, model: EdgeModel, *, form: PromptForm | None = None) -> None:
        self.model = model
        self.form = form
        self.threads = torch.get_num_threads()  # chosen for the model's size when it was loaded

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        sampling: Sampling | None = None,
        with_adapter: bool = True,  # False: the model as it was
        ignore_chat_template: bool | None = None,  # True: go on from a text as it stands; False: take the template
        on_text: Callable[[str], object] | None = None,  # called with the text piece by piece while it is written
        **settings: Any,
    ) -> str:
        """The text that follows `prompt`: plain text, or a conversation for the tokenizer's chat template.

        What goes on from a plain text begins with the blank that it needs, if any; answers are stripped. `settings` are
        fields of Sampling, such as max_new_tokens=64, and win over `sampling`.

        Raises ModelError for a conversation that is empty, without a template, or refused by it, for text that is none,
        and for a prompt longer than the model's positions; ConfigError for a setting that is none or out of its range.
        """
        sampling = sampling_from((sampling or Sampling()).model_dump() | settings)
        _require_text(prompt)
        form = self._form_of(prompt, ignore_chat_template)
        ids = self._prompt_ids(prompt, form)
        text_of = _Continuation(self.model.tokenizer, ids[0].tolist(), keeps_blanks=form == "plain")
        sampling = self._within_positions(ids.shape[1], sampling)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        mask = torch.ones_like(ids)
        passes = self.model.context.running(mask=mask.bool(), base_only=not with_adapter)
        with torch.no_grad(), torch.random.fork_rng(devices=devices), with_threads(self.threads), passes:
            torch.manual_seed(sampling.seed)  # transformers samples from the global generator only
            output = self.model.network.generate(
                input_ids=ids,
                attention_mask=mask,
                streamer=on_text and _Streamer(text_of, on_text),
                **self._settings(sampling),
            )
        text = text_of(output[0].tolist())
        return text if form == "plain" else text.rstrip()

    def _form_of(self, prompt: str | Sequence[Message], ignore_chat_template: bool | None) -> PromptForm:
        """How a prompt is put. Raises ModelError for a conversation that nothing can lay out."""
        has_template = self.model.tokenizer.chat_template is not None
        if ignore_chat_template is False or not isinstance(prompt, str):
            if not has_template or ignore_chat_template:
                raise ModelError(
                    f"{self.model.source}: without a chat template there is no conversation: give a plain prompt"
                )
            return "chat"
        form = "plain" if ignore_chat_template else self.form or "chat"
        return form if has_template or form != "chat" else "plain"

    def _prompt_ids(self, prompt: str | Sequence[Message], form: PromptForm) -> torch.Tensor:  # (1, tokens)
        if form == "chat":
            ids = self._conversation_ids([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        else:
            text = under_headings(str(prompt)) if form == "headings" else prompt
            ids = self.model.tokenizer(text, return_tensors="pt").input_ids
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
            "num_beams": 1,  # and what else a checkpoint's generation_config.json may ask for that is no text
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "stop_strings": None,
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


class _Continuation:
    """The text of the tokens that come after a prompt's."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], *, keeps_blanks: bool) -> None:
        self.decoded = partial(tokenizer.decode, skip_special_tokens=True)
        self.n_prompt = len(prompt_ids)
        self.prompt = self.decoded(prompt_ids) if keeps_blanks else None

    def __call__(self, ids: Sequence[int]) -> str:  # the prompt's first
        """What they add to the prompt; decoded with it, since many tokenizers drop the blank of a text's first word."""
        if self.prompt is not None and (whole := str(self.decoded(ids))).startswith(self.prompt):
            return whole[len(self.prompt) :]
        return str(self.decoded(ids[self.n_prompt :])).lstrip()


class _Streamer(BaseStreamer):
    """Tells a text while it is written, each character once it is whole."""

    def __init__(self, text_of: _Continuation, on_text: Callable[[str], object]) -> None:
        self.text_of = text_of
        self.on_text = on_text
        self.ids: list[int] = []
        self.n_told = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's tokens, and then each that is written."""
        is_prompt = not self.ids
        self.ids += value.flatten().tolist()
        if not is_prompt:
            self._tell(self.text_of(self.ids).rstrip(_HALF_A_CHARACTER))

    def end(self) -> None:
        """Tell what is left."""
        self._tell(self.text_of(self.ids))

    def _tell(self, text: str) -> None:
        if len(text) > self.n_told:
            self.on_text(text[self.n_told :])
            self.n_told = len(text)
