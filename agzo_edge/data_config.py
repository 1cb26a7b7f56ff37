"""The settings that say what is learned from which data; a part of `config.RunConfig`."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from agzo_edge.templates import pattern_fault, template_fault

PromptForm = Literal["chat", "headings", "plain"]  # by the chat template, by Alpaca's headings, as it stands
Objective = Literal["lm", "choice", "preference", "reward"]
METRICS: Mapping[Objective, tuple[str, ...]] = {  # what an evaluation tells
    "lm": ("loss",),
    "choice": ("loss", "accuracy", "macro_f1"),
    "preference": ("loss", "accuracy"),
    "reward": ("loss", "reward"),
}


class DataConfig(BaseModel):
    """Where rows come from, what they become, and what is learned from them. docs/guide/data.md."""

    data: str | None = Field(None, min_length=1, description="File, directory or hub id of the data.")
    eval_data: str | None = Field(None, min_length=1, description="Held-out file, evaluated before, during and after.")
    objective: Objective = Field("lm", description="What is learned.")
    prompt_template: str | None = Field(
        None, min_length=1, description="A row's prompt, made from its fields: 'Review: {sentence} It was'."
    )
    completion_template: str | None = Field(
        None, min_length=1, description="A row's completion, made from its fields: ' {answer}'."
    )
    options: tuple[str, ...] | None = Field(
        None, min_length=2, description="The options of every row, for choice; templates, as the prompt's."
    )
    labels: tuple[str, ...] | None = Field(
        None, min_length=2, description="What the answer field holds for each of the options, in their order."
    )
    answer_field: str | None = Field(None, min_length=1, description="The field that holds the answer, for choice.")
    preference_loss: Literal["dpo", "simpo"] = Field(
        "dpo", description="Loss of preferences: dpo refers to the frozen base, simpo to nothing."
    )
    beta: float | None = Field(
        None, gt=0, description="How sharply preferences are told apart; by default 0.1 for dpo and 2 for simpo."
    )
    reward: str | None = Field(
        None,
        min_length=1,
        description="Reward: exact_match, f1, regex, json_schema, length, module:function or file.py:function.",
    )
    reward_argument: str | None = Field(
        None, description="What a built-in reward needs: a regular expression, a schema's file, a number of characters."
    )
    reward_timeout_s: float = Field(10.0, gt=0, description="Seconds that a reward may take for one text.")
    max_new_tokens: int = Field(64, ge=1, description="Longest text that is written for a reward, in tokens.")
    temperature: float = Field(
        0.0, ge=0, description="Of the texts written for a reward while training; 0 takes the likeliest tokens."
    )
    line_pattern: str | None = Field(
        None, min_length=1, description="Regular expression whose named groups make a row of each line of a .txt file."
    )
    train_on: Literal["all", "last"] = Field("all", description="Assistant turns of a conversation that are learned.")
    mask_prompt: bool = Field(True, description="Take the loss on completions or assistant turns only.")
    max_seq_length: int = Field(1024, ge=2, description="Longest row in tokens.")
    overlong: Literal["error", "truncate", "drop"] = Field(
        "error", description="What to do with rows over the longest length."
    )

    eval_steps: int = Field(100, ge=0, description="Evaluate every so many steps; 0 only before and after.")
    metric_for_best_model: Literal["loss", "accuracy", "macro_f1", "reward"] = Field(
        "loss", description="Metric by which the adapter in best/ is chosen, and stopping early decided."
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="Stop after so many evaluations without a better one; 0 never stops."
    )

    @property
    def written_tokens(self) -> int:
        """Tokens that are written after each prompt: none but for a reward."""
        return self.max_new_tokens if self.objective == "reward" else 0

    @model_validator(mode="after")
    def _rows_can_be_made(self) -> Self:
        templates = {"prompt_template": self.prompt_template, "completion_template": self.completion_template}
        named = {name: text for name, text in templates.items() if text is not None}
        named |= {f"option {i}": option for i, option in enumerate(self.options or ())}
        faults = [f"{name} {text!r}: {fault}" for name, text in named.items() if (fault := template_fault(text))]
        for name, listed in (("options", self.options), ("labels", self.labels)):
            if listed and len(set(listed)) < len(listed):
                faults.append(f"{name} {list(listed)} holds one twice")
        if self.labels and self.options and len(self.labels) != len(self.options):
            faults.append(f"{len(self.labels)} labels for {len(self.options)} options: give one for each")
        if self.line_pattern and (fault := pattern_fault(self.line_pattern)):
            faults.append(f"line_pattern {self.line_pattern!r}: {fault}")
        if (self.objective == "reward") != (self.reward is not None):
            faults.append(
                "objective reward and the setting reward go together: --objective reward --reward exact_match"
            )
        if self.metric_for_best_model not in METRICS[self.objective]:
            known = ", ".join(METRICS[self.objective])
            faults.append(
                f"metric_for_best_model {self.metric_for_best_model} is not told by {self.objective}: {known}"
            )
        if self.early_stopping_patience and not (self.eval_data and self.eval_steps):
            faults.append("early_stopping_patience needs eval_data and eval_steps: nothing else tells when to stop")
        if faults:
            raise ValueError("; ".join(faults))
        return self
