"""Text from many rows at once, against one row at a time and against transformers."""

import copy

import pytest
import torch
from helpers import FAMILIES, dense_reference, teach_at_random, tiny_batch, tiny_model
from torch import Tensor

from agzo_edge.config import Sampling
from agzo_edge.errors import ConfigError, ModelError
from agzo_edge.model.branch import Branch
from agzo_edge.model.passes import Perturbation
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.model.writing import left_padded, written_texts
from agzo_edge.numerics.noise import draw_noise
from agzo_edge.numerics.sampling import uniform_numbers
from agzo_edge.serve.generate import TextModel
from agzo_edge.train.data import Batch

N_ROWS, N_NEW = 4, 6


def perturbation(batch: Batch, *steps: float) -> Perturbation:
    def noise_of(branch: Branch) -> Tensor:
        return draw_noise("sign", (N_ROWS, *branch.c.shape), seed=0, step=0, layer=branch.index, first_example=0)

    return Perturbation(noise_of=noise_of, example=batch.example, steps=steps)


def texts(model: EdgeModel, batch: Batch, *steps: float, temperature: float = 0.0) -> list[str]:
    def numbers(position: int) -> Tensor:
        return uniform_numbers(len(batch.places), seed=1, step=0, position=position, first_example=batch.first_example)

    with model.context.running(
        mask=batch.attention_mask.bool(), perturbation=perturbation(batch, *steps) if steps else None
    ):
        return written_texts(
            model,
            batch.input_ids,
            batch.attention_mask,
            max_new_tokens=N_NEW,
            temperature=temperature,
            uniforms=numbers,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_prompts_is_continued_as_each_one_alone(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(N_ROWS)
    teach_at_random(model)
    plain = dense_reference(model, change=lambda branch: branch.learned().dense())
    expected = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        prompt = ids[mask.bool()].unsqueeze(0)
        for _ in range(N_NEW):
            token = plain(prompt).logits[:, -1].argmax(-1, keepdim=True)
            if int(token) == model.tokenizer.eos_token_id:
                break
            prompt = torch.cat([prompt, token], 1)
        expected.append(model.tokenizer.decode(prompt[0, int(mask.sum()) :], skip_special_tokens=True).strip())
    assert texts(model, batch) == expected


def test_both_signs_write_what_each_one_writes_alone() -> None:
    model, batch = tiny_model(), tiny_batch(N_ROWS)
    together = texts(model, batch, 0.5, -0.5, temperature=1.0)
    assert together == texts(model, batch, 0.5, temperature=1.0) + texts(model, batch, -0.5, temperature=1.0)
    assert together[:N_ROWS] != together[N_ROWS:]


def test_without_a_perturbation_both_streams_write_the_same_drawn_text() -> None:
    model, batch = tiny_model(), tiny_batch(N_ROWS)
    drawn = texts(model, batch, 0.0, 0.0, temperature=1.0)
    assert drawn[:N_ROWS] == drawn[N_ROWS:]
    assert drawn[:N_ROWS] == texts(model, batch, temperature=1.0)
    assert drawn[:N_ROWS] != texts(model, batch)  # drawn, not the likeliest


def test_one_prompt_is_answered_as_by_generate() -> None:
    model = tiny_model()
    ids = model.tokenizer("abc", return_tensors="pt").input_ids
    with model.context.running(mask=torch.ones_like(ids).bool()):
        (text,) = written_texts(model, ids, torch.ones_like(ids), max_new_tokens=N_NEW)
    writer = TextModel(model)
    assert text == writer.generate("abc", sampling=Sampling(max_new_tokens=N_NEW)).strip()
    assert text == writer.generate("abc", sampling=Sampling(max_new_tokens=1), max_new_tokens=N_NEW).strip()
    with pytest.raises(ConfigError, match=r"(?s)top_p.*max_tokens: no such setting"):
        writer.generate("abc", max_tokens=N_NEW, top_p=2.0)


PICKY = (
    "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.content }}>{% endfor %}"
)


def test_a_conversation_that_is_empty_or_that_its_template_refuses_is_told_of() -> None:
    model = tiny_model()
    model.tokenizer = copy.deepcopy(model.tokenizer)
    writer = TextModel(model)
    with pytest.raises(ModelError, match="without a chat template"):
        writer.generate([{"role": "user", "content": "abc"}])
    model.tokenizer.chat_template = PICKY
    with pytest.raises(ModelError, match="refuses this conversation: no such role"):
        writer.generate([{"role": "tool", "content": "abc"}])
    with pytest.raises(ModelError, match="conversation is empty"):
        writer.generate([])
    with pytest.raises(ModelError, match="neither a text nor a conversation"):
        writer.generate(["abc", "def"])


def test_a_prompt_is_gone_on_from_as_it_stands_where_the_template_is_left_out() -> None:
    model = tiny_model()
    plain = TextModel(model).generate("abc", max_new_tokens=N_NEW)
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.chat_template = PICKY
    assert TextModel(model).generate("abc", max_new_tokens=N_NEW) != plain
    assert TextModel(model).generate("abc", max_new_tokens=N_NEW, ignore_chat_template=True) == plain


def test_a_prompt_is_put_as_the_adapters_rows_were() -> None:
    model = tiny_model()
    model.tokenizer = copy.deepcopy(model.tokenizer)
    under_headings = TextModel(model).generate("### Instruction:\nabc\n\n### Response:\n", max_new_tokens=N_NEW)
    assert TextModel(model, form="headings").generate("abc", max_new_tokens=N_NEW) == under_headings.strip()
    plain = TextModel(model).generate("abc", max_new_tokens=N_NEW)
    assert TextModel(model, form="chat").generate("abc", max_new_tokens=N_NEW) == plain  # there is no template
    model.tokenizer.chat_template = PICKY
    answer = TextModel(model).generate("abc", max_new_tokens=N_NEW)
    writer = TextModel(model, form="plain")
    assert writer.generate("abc", max_new_tokens=N_NEW) == plain
    assert writer.generate("abc", max_new_tokens=N_NEW, ignore_chat_template=False) == answer
    without = copy.deepcopy(model)
    without.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="without a chat template"):
        TextModel(without).generate("abc", ignore_chat_template=False)
    assert writer.generate([{"role": "user", "content": "abc"}], max_new_tokens=N_NEW) == answer


def test_a_checkpoints_own_way_to_generate_is_not_asked_for() -> None:
    model = tiny_model()
    plain = TextModel(model).generate("abc", max_new_tokens=N_NEW)
    model.network.generation_config = copy.deepcopy(model.network.generation_config)
    model.network.generation_config.update(
        return_dict_in_generate=True, stop_strings=["a"], num_beams=4, num_return_sequences=2
    )
    pieces: list[str] = []
    assert TextModel(model).generate("abc", max_new_tokens=N_NEW, on_text=pieces.append) == plain
    assert "".join(pieces) == plain


def test_a_text_goes_on_with_the_blank_that_it_needs() -> None:
    model = tiny_model()
    ids = model.tokenizer("abc", return_tensors="pt").input_ids
    whole = model.network.generate(ids, max_new_tokens=N_NEW, do_sample=False)[0]
    asked, expected = (model.tokenizer.decode(each, skip_special_tokens=True) for each in (ids[0], whole))
    text = TextModel(model).generate("abc", max_new_tokens=N_NEW)
    assert asked + text == expected
    assert text.startswith(" ")


def test_a_text_is_told_piece_by_piece_while_it_is_written() -> None:
    pieces: list[str] = []
    whole = TextModel(tiny_model()).generate("abc", max_new_tokens=40, on_text=pieces.append)
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_the_models_own_habits_of_writing_are_left_out() -> None:
    model, batch = tiny_model(), tiny_batch(N_ROWS)
    expected = texts(model, batch)
    model.network.generation_config.repetition_penalty = 5.0
    assert texts(model, batch) == expected


def test_padding_moves_to_the_front_and_nothing_else_moves() -> None:
    ids, mask = left_padded(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
