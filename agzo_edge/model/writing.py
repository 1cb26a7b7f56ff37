"""Text that a model writes, many rows at once, in whatever pass is under way: perturbed, both signs together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.sampling import drawn_tokens

Uniforms = Callable[[int], Tensor]  # the position in the answer -> (rows,) numbers in (0, 1)

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def stop_ids(model: EdgeModel) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, and what ends a turn of its chat template."""
    known = model.tokenizer.get_added_vocab()
    turn_end = next((known[token] for token in _TURN_ENDS if token in known), None)
    return sorted({model.tokenizer.eos_token_id, turn_end} - {None})


@torch.no_grad()
def written_texts(
    model: EdgeModel,
    input_ids: Tensor,  # (rows, tokens) int64, padded on the right
    attention_mask: Tensor,  # (rows, tokens) int64
    *,
    max_new_tokens: int,
    temperature: float = 0.0,  # 0 takes the likeliest token
    uniforms: Uniforms | None = None,  # needed for a temperature
) -> list[str]:  # streams * rows
    """What follows each prompt in each stream of the pass; both signs meet the same kernels and numbers.

    The keys and values of all tokens are kept (the plan counts them), so each weight is read once for a token.
    """
    streams = model.context.n_streams
    ids, mask = left_padded(input_ids, attention_mask)
    stops, n_prompt = stop_ids(model), ids.shape[1]
    chosen = [] if uniforms is None or temperature == 0 else [_Drawn(n_prompt, streams, temperature, uniforms)]
    output = model.network.generate(
        input_ids=ids.repeat(streams, 1),
        attention_mask=mask.repeat(streams, 1),
        logits_processor=LogitsProcessorList(chosen),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=stops[0] if stops else 0,
            eos_token_id=stops or None,
            repetition_penalty=1.0,  # not the model's own, which transformers would take where nothing is said
        ),
    )
    return [_text_of(model, ids) for ids in output[:, n_prompt:].tolist()]


def left_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with their padding in front, so that all prompts end together; (rows, tokens) both."""
    order = attention_mask.argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def _text_of(model: EdgeModel, ids: Sequence[int]) -> str:
    text: str = model.tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


class _Drawn(LogitsProcessor):
    """Leaves one token to each row: the one that its random number falls on, the same number for both signs."""

    def __init__(self, n_prompt: int, streams: int, temperature: float, uniforms: Uniforms) -> None:
        self.n_prompt = n_prompt
        self.streams = streams
        self.temperature = temperature
        self.uniforms = uniforms

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (streams * rows, vocabulary) that are −inf but for the drawn token."""
        numbers = self.uniforms(input_ids.shape[1] - self.n_prompt).to(scores.device).repeat(self.streams)
        tokens = drawn_tokens(scores / self.temperature, numbers)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)
