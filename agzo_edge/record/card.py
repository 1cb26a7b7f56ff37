"""The model card of an adapter: README.md as people who use PEFT expect it."""

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from agzo_edge.units import format_bytes

_METHOD = (
    "It was trained with forward passes only, by AGZO, activation-guided zeroth-order optimization "
    "([arXiv 2601.17261](https://arxiv.org/abs/2601.17261)): the update is estimated from differences "
    "between losses. That takes the memory of inference and more steps than back-propagation, which usually "
    "reaches a lower loss where its memory is there."
)
_QUANTIZED = (
    "The adapter fits the base model as it was quantized in training; on another quantization its outputs differ a "
    "little."
)

_GUIDE = (
    "Once in a window of steps it also used the error at the model's head (back-propagation through the head and the "
    "last norm only) to choose the direction of each layer's noise."
)
_PROMPTS = {
    "chat": "by the chat template",
    "headings": "under Alpaca's headings: `### Instruction:`, a line break, the prompt, a blank line, `### Response:`",
    "plain": "as they stand, without a chat template",
}


def model_card(facts: Mapping[str, Any]) -> str:
    """The text of README.md for an adapter. A fact that is missing or None leaves its line out.

    Facts: base_model, quantization, data_file, data_sha256, prompt_form, n_rows, eval_file, n_eval_rows; settings (a
    mapping); steps, n_tokens, and loss, reward and accuracy with _before and _after; wall_s, peak_bytes, limit_bytes,
    device, seed, version. Of a path only the last name is told: a card is made to be shared.
    """
    known = {name: value for name, value in facts.items() if value is not None}
    sections = [
        _front_matter(known),
        f"# LoRA adapter for {_name(known['base_model'])}\n" if "base_model" in known else "# LoRA adapter\n",
        _METHOD + "\n",
        _QUANTIZED + "\n" if known.get("quantization", "none") != "none" else "",
        _GUIDE + "\n" if known.get("settings", {}).get("guide") == "head" else "",
        _table("What it was trained on", _data_lines(known)),
        _table("Result", _result_lines(known)),
        _table("Settings", {name: _code(value) for name, value in known.get("settings", {}).items()}),
        _usage(known),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(known: Mapping[str, Any]) -> str:
    """YAML, each value quoted as JSON, which is YAML too; the hub accepts only a hub id as base_model."""
    base_model = str(known.get("base_model", ""))
    tags = ["lora", "agzo", "zeroth-order", "transformers"]
    lines = ["---"]
    if _is_hub_id(base_model):
        lines.append(f"base_model: {json.dumps(base_model)}")
        tags.insert(0, f"base_model:adapter:{base_model}")
    lines += ["library_name: peft", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join([*lines, "---", ""])


def _data_lines(known: Mapping[str, Any]) -> dict[str, str]:
    return _told(
        known,
        {
            "base_model": ("Base model", lambda value: _code(_name(value))),
            "quantization": ("Base weights", str),
            "data_file": ("Data", lambda value: _code(_last_part(value))),
            "data_sha256": ("SHA-256 of the data", _code),
            "n_rows": ("Rows", _count),
            "prompt_form": ("Prompts", _PROMPTS.__getitem__),
            "eval_file": ("Held-out data", lambda value: _code(_last_part(value))),
            "n_eval_rows": ("Held-out rows", _count),
        },
    )


def _result_lines(known: Mapping[str, Any]) -> dict[str, str]:
    return _told(
        known,
        {
            "loss_before": ("Held-out loss before", "{:.4f}".format),
            "loss_after": ("Held-out loss after", "{:.4f}".format),
            "reward_before": ("Held-out reward before", "{:.4f}".format),
            "reward_after": ("Held-out reward after", "{:.4f}".format),
            "accuracy_before": ("Accuracy before", "{:.1%}".format),
            "accuracy_after": ("Accuracy after", "{:.1%}".format),
            "steps": ("Steps", _count),
            "n_tokens": ("Tokens", _count),
            "wall_s": ("Time", "{:,.0f} s".format),
            "peak_bytes": ("Peak memory", format_bytes),
            "limit_bytes": ("Memory budget", format_bytes),
            "device": ("Device", str),
            "seed": ("Seed", str),
            "version": ("agzo-edge", str),
        },
    )


def _usage(known: Mapping[str, Any]) -> str:
    base = json.dumps(_name(known.get("base_model", "BASE_MODEL")), ensure_ascii=False)
    return f"""## How to use it

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "path/to/this/directory")
```

With agzo-edge:

```
agzo-edge generate --model {base} --adapter path/to/this/directory --prompt "Hello"
```
"""


def _told(known: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, str]:
    """Title and text of each fact in `words` that is known."""
    return {title: text_of(known[name]) for name, (title, text_of) in words.items() if name in known}


def _table(title: str, lines: Mapping[str, str]) -> str:
    """A Markdown table of two columns under its title; nothing for no lines."""
    if not lines:
        return ""
    rows = [f"| {name} | {_cell(text)} |" for name, text in lines.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _code(value: object) -> str:
    return "`" + str(value).replace("`", "'") + "`"


def _count(value: int) -> str:
    return f"{value:,}"


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _name(base_model: object) -> str:
    """A hub id whole; of a directory only its last part."""
    return str(base_model) if _is_hub_id(str(base_model)) else _last_part(base_model)


def _last_part(path: object) -> str:
    return PureWindowsPath(PurePosixPath(str(path)).name).name
