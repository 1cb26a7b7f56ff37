"""Every setting of a run, with its default, its range and its meaning: stated here once.

The command line's flags, the fields of a TOML file and the keyword arguments of the Python API are
all made from these classes and from DataConfig. Later sources win: built-in < preset < profile < file < flags.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from agzo_edge.data_config import DataConfig
from agzo_edge.errors import ConfigError, numbered
from agzo_edge.paths import expanded
from agzo_edge.presets import PRESETS
from agzo_edge.units import MIB, MOST_BYTES, parse_bytes
from agzo_edge.writers import ALL_LINEAR, writes_to_residual

UNGUIDED_RANK = 2  # measured: docs/decisions/0032
N_MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2, "sign": 0}  # of the optimizer, tensors of the size of C
KEPT_CHECKPOINTS = 2  # the last one, and one before it in case the disk dies under the last


def _bytes_from_text(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_bytes_from_text), Field(gt=0, lt=MOST_BYTES)]


class AgzoConfig(BaseModel):
    """The method: what one AGZO step does. Source: arXiv 2601.17261; docs/guide/method.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(
        16, ge=1, le=64, description="Directions in a layer's basis (r in the paper); without a guide 2 by default."
    )
    guide: Literal["auto", "none", "head"] = Field(
        "auto",
        description="What the noise follows: nothing, or, in the layers that write to the residual stream, the "
        "direction in which the errors at the head point; auto takes head wherever it can.",
    )
    guide_memory: float = Field(0.5, ge=0, lt=1, description="Share of the last window's guide in the next one.")
    refresh_every: int = Field(
        5,
        ge=0,
        description="Steps in a window, during which the basis is fixed; 0 keeps the first one for ever.",
    )
    power_iterations: int = Field(3, ge=1, le=20, description="Steps of subspace iteration that find a basis (K).")
    mu: float | Literal["auto"] = Field(
        "auto",
        description="Perturbation size, a fraction of each layer's output; auto probes the first batch.",
    )
    noise: Literal["sign", "gaussian"] = Field("sign", description="Distribution of the noise.")
    difference: Literal["central", "forward", "exact"] = Field(
        "central", description="How a directional derivative is taken; exact carries the tangent, no mu."
    )
    directions: Literal["example", "shared"] = Field(
        "example", description="A direction for each example of the batch, or one for all."
    )
    relative: bool = Field(True, description="Scale perturbation and step by the size of each layer's output.")
    normalize: bool = Field(True, description="Divide the step by the running spread of the projected gradients.")
    clip: float = Field(
        3.0,
        ge=0,
        description="Projected gradients are clipped at this multiple of their spread; 0 never clips.",
    )
    optimizer: Literal["sgd", "momentum", "adam", "sign"] = Field(
        "sgd", description="Update rule for the coefficients."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum, and Adam's first decay.")
    adam_beta2: float = Field(0.99, ge=0, lt=1, description="Adam's second decay.")
    learning_rate: float = Field(0.1, gt=0, description="Step length; less where the loss is steep.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Course of the learning rate after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises from zero.")
    undo_every: int = Field(
        50,
        ge=0,
        description="Steps between looks at whether the run got worse: it then goes back to its best state, and on "
        "with a third of the rate. What has gained no more than chance after the last step is not kept. 0 never looks.",
    )
    max_steps: int = Field(500, ge=1, description="Steps to train.")
    adapter_rank: int = Field(16, ge=1, le=1024, description="Largest rank of the accumulated adapter.")
    target: Literal["adapter", "dequantized"] = Field(
        "adapter", description="Learn a low-rank pair, or write into layers held dequantized."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the noise and of the data order.")

    @model_validator(mode="after")
    def _mu_is_positive(self) -> Self:
        if self.mu != "auto" and self.mu <= 0:
            raise ValueError(f"mu is {self.mu}: it must be positive, or 'auto'")
        return self


class RunConfig(AgzoConfig, DataConfig):
    """A whole run: the method and the data, and the model, machine and outputs around them."""

    model: str | None = Field(
        None,
        min_length=1,
        description="Directory or hub id of a causal language model; by default that of the adapter in use, else the "
        "demo's.",
    )
    output_dir: str | None = Field(
        None, min_length=1, description="Directory of the run; must be empty, or hold a run to resume."
    )
    adapter: str | None = Field(None, min_length=1, description="A PEFT LoRA directory to start from.")
    profile: str = Field("auto", description="Name or TOML file of a machine; auto detects.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to compute.")
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads; 0 takes one for a small model, where more are slower, else torch's.",
    )
    vram_limit: Bytes | None = Field(None, description="Memory budget of the GPU, with its unit: 6GiB.")
    ram_limit: Bytes | None = Field(None, description="Memory budget of the host, with its unit: 12GiB.")
    on_overflow: Literal["fail", "shrink", "stream"] = Field(
        "shrink",
        description="When a run does not fit: refuse it, work in smaller pieces, or also stream the layers.",
    )
    load_in_4bit: bool = Field(True, description="Quantize linear layers to 4 bit.")
    load_in_8bit: bool = Field(False, description="Quantize linear layers to 8 bit.")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit code book.")
    double_quant: bool = Field(False, description="Quantize the 4-bit scales as well.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute dtype; auto is float32 on a CPU and 16 bit on a GPU."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that a checkpoint brings.")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Names or suffixes of the layers to train, or all-linear; by default those that write to the "
        "residual stream (o_proj, down_proj).",
    )
    batch_size: int = Field(16, ge=1, description="Examples in a step.")
    group_by_length: bool = Field(True, description="Put examples of like length in a step: little padding.")
    micro_batch_size: int | None = Field(None, ge=1, description="Examples in one forward pass; all by default.")
    fuse_signs: bool = Field(True, description="Both signs in one pass; else one after the other, in less memory.")
    mlp_chunk_tokens: int | None = Field(
        None, ge=16, description="Tokens of each row that an MLP works on at once; all by default."
    )
    logits_chunk: Bytes = Field(64 * MIB, description="Float32 logits that exist at once, with their unit: 64MiB.")
    offload: Literal["none", "embeddings", "layers"] = Field(
        "none",
        description="What waits outside the device until it is used: embeddings and head, or also all layers.",
    )
    save_steps: int = Field(100, ge=0, description="Write the adapter every so many steps; 0 only at the end.")
    report_to: Literal["none", "tensorboard"] = Field("none", description="Where else to send the metrics.")

    @model_validator(mode="before")
    @classmethod
    def _guide_is_chosen(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Settle what `auto` is: rewards have no derivative to guide by, other layers no way to be led.

        Full noise grows with the rank, a guide's does not: without one the basis has fewer directions by default.
        """
        guide = given.get("guide", "auto")
        if guide == "auto":
            named = given.get("target_modules")
            targets = [str(name) for name in named] if isinstance(named, list | tuple) else []
            can_lead = not targets or any(name == ALL_LINEAR or writes_to_residual(name) for name in targets)
            guide = "head" if can_lead and given.get("objective") != "reward" else "none"
        return {**({"rank": UNGUIDED_RANK} if guide == "none" else {}), **given, "guide": guide}

    @field_validator("model", "adapter", "data", "eval_data", "output_dir")
    @classmethod
    def _home_is_found(cls, name: str | None) -> str | None:
        return name and expanded(name)

    @field_validator("vram_limit", "ram_limit", mode="before")
    @classmethod
    def _is_no_bare_number(cls, limit: object) -> object:
        if isinstance(limit, int) and limit < MIB:
            raise ValueError(f"{limit} has no unit: write '{limit}GiB' or '{limit}MiB'")
        return limit

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        faults = []
        if self.warmup_steps >= self.max_steps > 1:
            faults.append(f"warmup_steps is {self.warmup_steps}, and the run has only {self.max_steps} steps")
        if self.micro_batch_size and self.micro_batch_size > self.batch_size:
            faults.append(f"micro_batch_size {self.micro_batch_size} is larger than batch_size {self.batch_size}")
        if self.target == "dequantized" and self.objective == "preference" and self.preference_loss == "dpo":
            faults.append("target dequantized writes into the base, which dpo refers to: use preference_loss simpo")
        if self.objective == "reward" and self.difference == "exact":
            faults.append("difference exact carries a derivative, which a reward has not: use central")
        if self.objective == "reward" and self.guide != "none":
            faults.append(f"guide {self.guide} asks for a derivative, which a reward has not: use none")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def can_go_back(self) -> bool:
        """Whether the run looks for harm: losses must come from a plain pass, and the base must not be written to."""
        return self.undo_every > 0 and self.objective != "reward" and self.target == "adapter"


class Sampling(BaseModel):
    """How text is written, token by token."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(256, ge=1, description="Longest answer in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token; 1 samples as the model says.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that make up this share.")
    repetition_penalty: float = Field(1.0, gt=0, description="Over 1 makes repeated tokens less likely.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampling.")


def config_from(*sources: Mapping[str, Any], preset: str = "default") -> RunConfig:
    """The run that `sources` describe on top of `preset`; a later source wins over an earlier one.

    Raises ConfigError, naming every field that is unknown or out of range.
    """
    if not isinstance(preset, str) or preset not in PRESETS:  # a TOML file may hold anything
        raise ConfigError(f"preset {preset!r} does not exist: choose one of {', '.join(PRESETS)}")
    merged: dict[str, Any] = dict(PRESETS[preset])
    for source in sources:
        given = {name.replace("-", "_"): _plain(value) for name, value in source.items() if value is not None}
        if given.get("load_in_4bit") and given.get("load_in_8bit"):
            raise ConfigError("load_in_4bit and load_in_8bit are both asked for: choose one of them")
        for width, other in (("load_in_8bit", "load_in_4bit"), ("load_in_4bit", "load_in_8bit")):
            if given.get(width):
                given[other] = False  # the later source's width holds
        merged.update(given)
    try:
        return RunConfig(**merged)
    except ValidationError as error:
        raise ConfigError("these settings cannot be used:\n" + numbered(_faults(error))) from None


def _plain(value: Any) -> Any:
    """A path as its text, everything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def sampling_from(settings: Mapping[str, Any]) -> Sampling:
    """The sampling that `settings` describe, what is None left out. Raises ConfigError with every fault."""
    try:
        return Sampling(**{name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        raise ConfigError("these settings cannot be used:\n" + numbered(_faults(error))) from None


def _faults(error: ValidationError) -> list[str]:
    """One line per wrong field: its name, what was given, and what is allowed."""
    lines: dict[str, str] = {}  # of a field that may be of several types, the first complaint
    for fault in error.errors():
        field = f"{fault['loc'][0]}: " if fault["loc"] else ""
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "no such setting"
        elif fault["type"] == "tuple_type":
            message = f"{fault['input']!r} given; it should be a list, such as [{str(fault['input'])!r}]"
        elif fault["type"] == "too_short" and isinstance(fault["input"], list | tuple):
            message = f"{fault['input']!r} given; at least {fault['ctx']['min_length']} are needed"
        elif fault["type"] != "value_error":
            message = f"{fault['input']!r} given; {message[0].lower()}{message[1:]}"
        lines.setdefault(field, f"{field}{message}")
    return list(lines.values())


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, flat or under table headings that only group them.

    Raises ConfigError when the file is missing, is not TOML, or sets a field twice.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, RuntimeError, ValueError) as error:  # no TOML, nested too deeply, a name that is none
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    flat: dict[str, Any] = {}
    for name, value in document.items():
        fields = value if isinstance(value, dict) else {name: value}
        if twice := flat.keys() & fields.keys():
            raise ConfigError(f"{path}: set twice: {', '.join(sorted(twice))}")
        flat.update(fields)
    return flat
