"""`adapter_config.json`: what a PEFT LoRA says about itself, written and read."""

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agzo_edge.errors import AdapterError, numbered
from agzo_edge.record.strict_json import strict_object

# Fields that do not change the function of a trained pair, or that this module reads.
_UNDERSTOOD = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
        *("lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
        *("qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora"),
    }
)
# Others (pissa, olora, loftq, ...) change the base's weights too, so that the pair alone is another function.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_MAX_PATTERN_LENGTH = 512
_MAX_PATTERNS = 4096
_MAX_CHOICES = 2  # in a pattern; more, or a repeated group, and a stranger's could take hours to match
_MAX_CHOOSING_PATTERNS = 64


@dataclass(frozen=True)
class LoraScaling:
    """How a LoRA's pairs are to be multiplied."""

    rank: int
    alpha: float
    ranks: Mapping[re.Pattern[str], int]  # of layers that differ; the first match counts, as in PEFT
    alphas: Mapping[re.Pattern[str], float]
    rank_stabilized: bool  # alpha / sqrt(rank), arXiv 2312.03732, instead of alpha / rank

    def rank_of(self, module: str) -> int:
        """The rank of the pair of `module`."""
        return next((rank for pattern, rank in self.ranks.items() if pattern.match(module)), self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor with which b @ a of `module` is added to the weight."""
        alpha = next((alpha for pattern, alpha in self.alphas.items() if pattern.match(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def lora_config_text(
    ranks: Mapping[str, int],  # of each layer, by its module path
    *,
    base_model: str,
    transposed: bool,  # the layers are GPT-2's Conv1D, whose weight is (in, out)
) -> str:
    """The configuration with which PEFT adds b @ a, unscaled, to exactly these layers."""
    from peft import LoraConfig  # costs seconds, and only a save needs it

    largest = max(ranks.values())
    # PEFT reads the keys as regular expressions that may match the end of a longer path
    different = {f"^{re.escape(module)}": rank for module, rank in sorted(ranks.items()) if rank != largest}
    fields = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=different,
        alpha_pattern=different,
        target_modules=list(ranks),
        fan_in_fan_out=transposed,
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    fields["target_modules"] = sorted(ranks)
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def lora_scaling(text: bytes, *, where: str) -> LoraScaling:
    """The scaling of the LoRA that an adapter_config.json describes.

    Raises AdapterError, with every fault, when it is no LoRA or one that is more than a pair for each layer.
    """
    try:
        config = strict_object(text)
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from None
    faults = _unsupported(config) + _wrong_numbers(config)
    if faults:
        raise AdapterError(f"{where}: this adapter cannot be used:\n" + numbered(faults))
    return LoraScaling(
        rank=config["r"],
        alpha=config["lora_alpha"],
        ranks={_compiled(key): rank for key, rank in (config.get("rank_pattern") or {}).items()},
        alphas={_compiled(key): alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
        rank_stabilized=bool(config.get("use_rslora")),
    )


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """A line for each thing in `config` that is more than a low-rank pair for each layer."""
    faults = []
    if (kind := config.get("peft_type")) != "LORA":
        faults.append(f"peft_type is {kind!r}: only LORA can be read")
    if (bias := config.get("bias", "none")) != "none":
        faults.append(f"bias is {bias!r}: trained biases cannot be read, only 'none'")
    if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        faults.append(f"init_lora_weights is {start!r}, which changes the base: convert it to a plain LoRA first")
    if modules := config.get("modules_to_save"):
        faults.append(f"modules_to_save is {modules!r}: whole trained modules cannot be read")
    others = sorted(name for name in config.keys() - _UNDERSTOOD if config[name])
    faults.extend(f"{_shown(name)} is {_shown(config[name])}: only plain LoRA can be read" for name in others)
    return faults


def _shown(value: object) -> str:
    """The beginning of a stranger's value, without what would move a terminal's cursor."""
    text = str(value)[:60]
    return text if text.isprintable() else repr(text)


def _wrong_numbers(config: Mapping[str, Any]) -> list[str]:
    """A line for each rank or alpha that is none, and each pattern that cannot be matched."""
    return _wrong_field(config, "r", "rank_pattern", is_right=_is_rank, wanted="a whole number from 1") + _wrong_field(
        config, "lora_alpha", "alpha_pattern", is_right=_is_alpha, wanted="a finite number"
    )


def _wrong_field(
    config: Mapping[str, Any],
    name: str,
    pattern_name: str,
    *,
    is_right: Callable[[object], bool],
    wanted: str,
) -> list[str]:
    faults = []
    if not is_right(config.get(name)):
        faults.append(f"{name} is {config.get(name)!r}: it must be {wanted}")
    patterns = config.get(pattern_name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        return [*faults, f"{pattern_name} must be an object of at most {_MAX_PATTERNS} patterns"]
    if sum(_n_choices(key) > 0 for key in patterns) > _MAX_CHOOSING_PATTERNS:
        faults.append(f"{pattern_name} has more than {_MAX_CHOOSING_PATTERNS} patterns with repeats or alternatives")
    for key, value in patterns.items():
        if not is_right(value):
            faults.append(f"{pattern_name}: {key!r} has {value!r}: it must be {wanted}")
        if not _is_safe(key):
            faults.append(f"{pattern_name}: {key[:80]!r} is no pattern that can be matched quickly")
    return faults


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e30


def _is_safe(pattern: str) -> bool:
    """Whether `pattern` is a regular expression that is matched in a moment, whatever the name."""
    if len(pattern) > _MAX_PATTERN_LENGTH or _n_choices(pattern) > _MAX_CHOICES or re.search(r"\)[*+?{]", pattern):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a set that a later Python reads in another way
            _compiled(pattern)
    except (re.error, RecursionError, OverflowError, Warning):
        return False
    return True


def _n_choices(pattern: str) -> int:
    """How many repeats and groups of alternatives there are; the time to match can be exponential in it."""
    return sum(pattern.count(sign) for sign in "*+?{") + (pattern.count("(") if "|" in pattern else 0)


def _compiled(pattern: str) -> re.Pattern[str]:
    """What matches the end of a module's path, from a dot on, as PEFT matches it."""
    return re.compile(rf"(.*\.)?({pattern})$")
