"""Text from a model with its adapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
        **settings: Any,
    ) -> str:
        """The text that follows `prompt`: plain text, or a conversation for the tokenizer's chat template.

        A model with a chat template answers a plain prompt as a user's message. `settings` are fields of Sampling,
        such as max_new_tokens=64, and win over `sampling`. Raises ModelError for a conversation without a template, and
        for a prompt longer than the model's positions, ConfigError for a setting that is none or out of its range.
        """
        sampling = sampling_from((sampling or Sampling()).model_dump() | settings)
        ids = self._prompt_ids(prompt)
        sampling = self._within_positions(ids.shape[1], sampling)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        mask = torch.ones_like(ids)
        passes = self.model.context.running(mask=mask.bool(), base_only=not with_adapter)
        with torch.no_grad(), torch.random.fork_rng(devices=devices), passes:
            torch.manual_seed(sampling.seed)  # transformers samples from the global generator only
            output = self.model.network.generate(input_ids=ids, attention_mask=mask, **self._settings(sampling))
        text: str = self.model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()

    def _prompt_ids(self, prompt: str | Sequence[Message]) -> torch.Tensor:  # (1, tokens)
        tokenizer = self.model.tokenizer
        if tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise ModelError(f"{self.model.source}: the tokenizer has no chat template: give a plain prompt")
            ids = tokenizer(prompt, return_tensors="pt").input_ids
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
        if ids.shape[1] == 0:
            raise ModelError("the prompt is empty, and the tokenizer adds nothing to it: write at least a word")
        if (highest := int(ids.max())) >= (n_words := self.model.vocab_size):
            raise ModelError(f"{self.model.source}: token {highest} of {n_words:,} words: the tokenizer is not its own")
        return ids.to(self.model.device)

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
