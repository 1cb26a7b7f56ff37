from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from character_tokens import CHATML, CHATML_MARKED, character_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from agzo_edge.demo import MODEL_DIR
from agzo_edge.errors import DataError
from agzo_edge.train.conversation import require_chat_template
from agzo_edge.train.formats import Format, SoundRow
from agzo_edge.train.template import Asking, asking_of, token_rows, under_headings
from agzo_edge.train.tokens import TokenRow

# Leaves the thought out of turns that others follow, as Qwen3 does.
THINKING = (
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Puts the system message before the last user message, as Mistral does.
SYSTEM_LAST = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST]"
    "{% if loop.last or loop.index0 == loop.length - 2 %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No more."},
]


def labels(row: TokenRow, tokenizer: Tokenizer) -> list[str]:
    """The labelled stretches of a row, as text."""
    runs: list[list[int]] = []
    for position, (token, is_label) in enumerate(zip(row.input_ids, row.is_label, strict=True)):
        if is_label and (position == 0 or not row.is_label[position - 1]):
            runs.append([])
        if is_label:
            runs[-1].append(int(token))
    return [tokenizer.decode(run) for run in runs]


def rows_of(
    fields: dict[str, Any],
    row_format: Format,
    tokenizer: Tokenizer,
    *,
    mask_prompt: bool = True,
) -> tuple[TokenRow, ...]:
    rows = token_rows(fields, row_format, tokenizer, mask_prompt=mask_prompt)
    for row in rows:
        assert row.input_ids.dtype == np.int64
        assert row.input_ids.shape == row.is_label.shape
        assert not row.is_label[0]
    return rows


def row_of(*arguments: Any, **settings: Any) -> TokenRow:
    (row,) = rows_of(*arguments, **settings)
    return row


def test_a_completion_is_learned_with_its_end_and_the_prompt_is_not(tokenizer: Tokenizer) -> None:
    row = row_of({"prompt": "2+2=", "completion": " 4"}, "prompt-completion", tokenizer)
    assert tokenizer.decode(row.input_ids) == "<s>2+2= 4</s>"
    assert labels(row, tokenizer) == [" 4</s>"]


def test_all_of_a_text_is_learned_with_its_end(tokenizer: Tokenizer) -> None:
    assert labels(row_of({"text": "abc"}, "text", tokenizer), tokenizer) == ["abc</s>"]


def test_without_a_bos_the_first_token_of_a_text_is_no_label() -> None:
    tokenizer = character_tokenizer("$A")
    assert labels(row_of({"text": "abc"}, "text", tokenizer), tokenizer) == ["bc</s>"]


def test_an_unmasked_prompt_is_learned_but_for_the_first_token(tokenizer: Tokenizer) -> None:
    row = row_of({"prompt": "2+2=", "completion": "4"}, "prompt-completion", tokenizer, mask_prompt=False)
    assert labels(row, tokenizer) == ["2+2=4</s>"]


@pytest.mark.parametrize("single", ["<s> $A", "$A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("prompt", ["a", "<s>a"])
@pytest.mark.parametrize("completion", ["b", "b</s>"])
def test_special_tokens_are_never_doubled(single: str, prompt: str, completion: str) -> None:
    tokenizer = character_tokenizer(single)
    row = row_of({"prompt": prompt, "completion": completion}, "prompt-completion", tokenizer)
    bos = "<s>" if "<s>" in single + prompt else ""
    assert tokenizer.decode(row.input_ids) == f"{bos}ab</s>"
    assert labels(row, tokenizer) == ["b</s>"]


def test_a_token_that_straddles_the_boundary_is_learned(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "tiny-novels")
    whole = tokenizer("the")["input_ids"]
    assert len(whole) == 1
    row = row_of({"prompt": "Is th", "completion": "e"}, "prompt-completion", tokenizer)
    together = tokenizer("Is the")["input_ids"]
    assert row.input_ids.tolist() == [*together, tokenizer.eos_token_id]
    assert labels(row, tokenizer)[0].strip().startswith("th")


@pytest.mark.parametrize("name", ["stories260K", "tiny-novels", "tinystories-chat-3m"])
def test_ids_and_mask_equal_what_trl_makes_of_a_row(shared_dir: Path, name: str) -> None:
    """TRL: prompt, and prompt with completion and EOS, tokenised; the prompt's length is masked."""
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / name)
    prompt, completion = "Once upon a time, Lily saw", " a big dog. It was 3 o'clock!"
    row = row_of({"prompt": prompt, "completion": completion}, "prompt-completion", tokenizer)
    n_prompt = len(tokenizer(prompt)["input_ids"])
    assert row.input_ids.tolist() == tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
    assert row.is_label.tolist() == [i >= n_prompt for i in range(len(row.input_ids))]
    text = row_of({"text": completion}, "text", tokenizer)
    assert text.input_ids.tolist() == tokenizer(completion + tokenizer.eos_token)["input_ids"]
    assert text.is_label.tolist() == [i > 0 for i in range(len(text.input_ids))]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_every_assistant_turn_is_learned_and_nothing_else(tokenizer: Tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    row = row_of({"messages": TALK}, "messages", tokenizer)
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    end = "<|im_end|>" if template == CHATML_MARKED else "<|im_end|>\n"  # a prefix cannot tell whose the newline is
    assert labels(row, tokenizer) == [f"Ho{end}", f"No more.{end}"]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_an_answer_of_weight_0_is_not_learned(tokenizer: Tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    talk = [turn | {"weight": 0} if turn["content"] == "Ho" else turn for turn in TALK]
    assert labels(row_of({"messages": talk}, "messages", tokenizer), tokenizer) == ["No more.<|im_end|>\n"]
    with pytest.raises(DataError, match="--no-mask-prompt learns all of them"):
        row_of({"messages": talk}, "messages", tokenizer, mask_prompt=False)
    last_out = [*TALK[:-1], TALK[-1] | {"weight": 0}]
    (row,) = token_rows({"messages": last_out}, "messages", tokenizer, mask_prompt=True, train_on="last")
    assert not row.is_label.any()
    talk = [turn | {"weight": 1} if turn["role"] == "assistant" else turn for turn in TALK]
    expected = row_of({"messages": TALK}, "messages", tokenizer)
    assert np.array_equal(row_of({"messages": talk}, "messages", tokenizer).is_label, expected.is_label)


@pytest.mark.parametrize(
    ("row_format", "fields", "form", "prompt"),
    [
        ("messages", {"messages": TALK}, "chat", "Hi"),
        ("prompt-completion", {"prompt": TALK[:2], "completion": TALK[2:3]}, "chat", "Hi"),
        ("prompt-completion", {"prompt": "Hi", "completion": " Ho"}, "plain", "Hi"),
        ("choice", {"prompt": "Hi", "options": [" a", " b"], "answer": 0}, "plain", "Hi"),
        ("prompt", {"prompt": "Hi"}, "plain", "Hi"),
        ("text", {"text": "one two\nthree four five six seven"}, "plain", "one two three four five six"),
        ("alpaca", {"instruction": "Add.", "input": "1", "output": "3"}, "headings", "Add.\n\n### Input:\n1"),
        ("messages", {"messages": [{"role": "user", "tool_calls": [{}]}]}, "chat", ""),
    ],
)
def test_how_a_row_asks_is_how_it_was_made_of_tokens(
    tokenizer: Tokenizer, row_format: Format, fields: dict[str, Any], form: str, prompt: str
) -> None:
    assert asking_of(SoundRow("f:1", row_format, fields), tokenizer) == Asking(form, prompt)


def test_an_instruction_is_asked_as_it_was_learned(tokenizer: Tokenizer) -> None:
    row = SoundRow("f:1", "alpaca", {"instruction": "Name a colour.", "input": "a warm one", "output": "Blue"})
    learned = tokenizer.decode(row_of(row.fields, "alpaca", tokenizer).input_ids, skip_special_tokens=True)
    assert learned == under_headings(asking_of(row, tokenizer).prompt) + "Blue"
    tokenizer.chat_template = CHATML
    assert asking_of(row, tokenizer).form == "chat"


def test_a_template_that_writes_bos_gets_no_second_one(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    row = row_of({"messages": TALK}, "messages", tokenizer)
    assert (row.input_ids == tokenizer.bos_token_id).sum() == 1


def test_turns_are_found_where_a_template_drops_earlier_thoughts(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = THINKING
    row = row_of({"messages": TALK}, "messages", tokenizer)
    assert labels(row, tokenizer) == ["Ho<|im_end|>\n", "<think>\n\n</think>\n\nNo more.<|im_end|>\n"]


@pytest.mark.parametrize(
    ("first", "label"),
    [
        ({"content": " Ho"}, " Ho<|im_end|>\n"),
        ({"content": "d"}, "d<|im_end|>\n"),  # which the end of a turn holds as well
        ({"content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}, "CALL look<|im_end|>\n"),
    ],
)
def test_an_earlier_turn_is_what_is_left_of_it(tokenizer: Tokenizer, first: dict[str, Any], label: str) -> None:
    calls = "{% for call in m.tool_calls %}CALL {{ call.function.name }}{% endfor %}"
    tokenizer.chat_template = THINKING.replace("{{ m.content }}", "{{ m.content }}" + calls)
    talk = [*TALK[:2], {"role": "assistant", **first}, *TALK[3:]]
    assert labels(row_of({"messages": talk}, "messages", tokenizer), tokenizer)[0] == label


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_what_a_template_leaves_out_is_not_learned_as_silence(tokenizer: Tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    with pytest.raises(DataError, match="does not write the call of a tool in message 3"):
        row_of({"messages": [*TALK[:2], call]}, "messages", tokenizer)
    tokenizer.chat_template = template.replace("content", "text")
    with pytest.raises(DataError, match="does not write the text of message 5"):
        row_of({"messages": TALK}, "messages", tokenizer)


def test_a_template_that_rewrites_the_past_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = SYSTEM_LAST
    assert labels(row_of({"messages": TALK[:3]}, "messages", tokenizer), tokenizer) == ["Ho</s>"]
    with pytest.raises(DataError, match=r"rewrites what stands before message 3 .* give prompt and completion"):
        row_of({"messages": TALK}, "messages", tokenizer)


def test_a_conversation_that_the_template_refuses_says_so(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = REFUSING
    with pytest.raises(DataError, match=r"the chat template refuses this conversation: roles must alternate"):
        row_of({"messages": TALK}, "messages", tokenizer)


def test_messages_without_a_chat_template_are_refused_with_two_ways_out(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"give prompt and completion instead, or take a chat model"):
        require_chat_template(tokenizer, "notes.jsonl")


def test_an_unmasked_conversation_is_learned_as_a_whole(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = CHATML_MARKED
    row = row_of({"messages": TALK}, "messages", tokenizer, mask_prompt=False)
    assert row.is_label.tolist() == [False] + [True] * (len(row.is_label) - 1)


def test_an_alpaca_row_is_an_exchange_or_has_headings(tokenizer: Tokenizer) -> None:
    fields = {"instruction": "Add.", "input": "2 2", "output": "4"}
    row = row_of(fields, "alpaca", tokenizer)
    text = "<s>### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n4</s>"
    assert tokenizer.decode(row.input_ids) == text
    assert labels(row, tokenizer) == ["4</s>"]
    tokenizer.chat_template = CHATML_MARKED
    row = row_of(fields, "alpaca", tokenizer)
    assert "user\nAdd.\n\n2 2<|im_end|>" in tokenizer.decode(row.input_ids)
    assert labels(row, tokenizer) == ["4<|im_end|>"]


def test_each_option_is_scored_after_the_same_prompt_without_an_end(tokenizer: Tokenizer) -> None:
    rows = rows_of({"prompt": "Good? ", "options": ["yes", "no"]}, "choice", tokenizer, mask_prompt=False)
    assert [tokenizer.decode(row.input_ids) for row in rows] == ["<s>Good? yes", "<s>Good? no"]
    assert [labels(row, tokenizer) for row in rows] == [["yes"], ["no"]]


def test_options_are_scored_from_one_boundary_where_one_merges_with_the_prompt(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "tiny-novels")
    rows = rows_of({"prompt": "Is th", "options": ["e", "!"]}, "choice", tokenizer)
    starts = [int(row.is_label.argmax()) for row in rows]
    assert starts[0] == starts[1] < len(tokenizer("Is th")["input_ids"])


def test_options_of_the_same_tokens_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"options 0 and 2 are the same tokens"):
        token_rows({"prompt": "a", "options": ["é", "b", "ü"]}, "choice", tokenizer, mask_prompt=True)


words = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12).filter(str.strip)


@given(contents=st.lists(words, min_size=2, max_size=7))
def test_prefix_difference_agrees_with_generation_marks(contents: Sequence[str]) -> None:
    talk = [
        {"role": "user" if turn % 2 == 0 else "assistant", "content": content} for turn, content in enumerate(contents)
    ]
    plain = character_tokenizer("<s> $A", chat_template=CHATML)
    marked = character_tokenizer("<s> $A", chat_template=CHATML_MARKED)
    by_prefix = row_of({"messages": talk}, "messages", plain)
    by_mark = row_of({"messages": talk}, "messages", marked)
    assert by_prefix.input_ids.tolist() == by_mark.input_ids.tolist()
    stretches = [text.removesuffix("\n") for text in labels(by_prefix, plain)]
    assert stretches == labels(by_mark, marked)


def test_an_option_that_melts_into_the_prompts_only_token_is_named_with_the_remedy() -> None:
    demo = AutoTokenizer.from_pretrained(MODEL_DIR)
    with pytest.raises(DataError, match=r"option 0 adds no token to the prompt.*begin options with a space"):
        token_rows({"prompt": "a", "options": ["x", " y"]}, "choice", demo, mask_prompt=True)
