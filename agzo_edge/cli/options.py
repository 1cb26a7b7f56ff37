"""The flags: one for each field of RunConfig, made from the field itself.

Name, type, choices, default, range and help are read from the field and never restated. A flag's own
default is None, not given: which default holds is decided where the sources of a run are merged.
"""

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from agzo_edge.config import Bytes, RunConfig, Sampling, sampling_from
from agzo_edge.errors import UsageError
from agzo_edge.units import format_bytes

Command = TypeVar("Command", bound=Callable[..., None])

_ASIDE = {
    "Model": "model adapter load_in_4bit load_in_8bit quant_type double_quant dtype trust_remote_code",
    "Data": "data eval_data objective prompt_template completion_template options labels answer_field line_pattern "
    "train_on mask_prompt max_seq_length overlong batch_size group_by_length preference_loss beta reward "
    "reward_argument reward_timeout_s max_new_tokens temperature",
    "Memory": "profile device vram_limit ram_limit on_overflow micro_batch_size fuse_signs logits_chunk "
    "mlp_chunk_tokens offload",
    "Output": "output_dir eval_steps metric_for_best_model early_stopping_patience save_steps report_to",
}
_PANELS = {name: panel for panel, names in _ASIDE.items() for name in names.split()}
_ORDER = ("Model", "Data", "Method", "Memory", "Output")
_LIMITS = {"ge": "from {}", "gt": "over {}", "le": "to {}", "lt": "below {}"}


def with_settings(*panels: str, without: Collection[str] = (), sampling: bool = False) -> Callable[[Command], Command]:
    """A decorator that gives a command's `**settings` the flags of `panels`; no panel is all of them.

    With `sampling` also those of `Sampling`; `sampling_apart` takes them out again. A parameter that the command spells
    out itself wins over the field of that name.
    """

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {parameter.name for parameter in own} | set(without)
        fields = {name: field for name, field in RunConfig.model_fields.items() if name not in taken}
        shown = [name for name in fields if panel_of(name) in (panels or _ORDER)]
        shown.sort(key=lambda name: _ORDER.index(panel_of(name)))
        flags = [flag(name, fields[name], panel=panel_of(name)) for name in shown]
        of_text = Sampling.model_fields if sampling else {}
        flags = [flag(name, field, panel="Text") for name, field in of_text.items()] + flags
        command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        return command

    return decorate


def panel_of(name: str) -> str:
    """The heading of `--help` that a field stands under."""
    return _PANELS.get(name, "Method")


def flag(name: str, field: FieldInfo, *, panel: str) -> inspect.Parameter:
    """The flag of a field, as a parameter that typer reads."""
    kind, metavar = _kind_of(field)
    option = typer.Option(help=_help_of(name, field), metavar=metavar, rich_help_panel=panel, show_default=False)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]  # a value, no type
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def given(settings: Mapping[str, object]) -> dict[str, Any]:
    """The settings whose flags were given, with lists taken apart. Raises UsageError for a list that cannot be read."""
    return {
        name: _pieces(name, value) if isinstance(value, str) and _is_list(name) else value
        for name, value in settings.items()
        if value is not None
    }


def sampling_apart(settings: Mapping[str, object]) -> tuple[Sampling, dict[str, Any]]:
    """What the flags of a command `with_settings(sampling=True)` gave: how to sample, and all else."""
    ours = {name: value for name, value in settings.items() if name in Sampling.model_fields}
    return sampling_from(ours), given({name: value for name, value in settings.items() if name not in ours})


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """The words of a command line that give `settings`; what is None is left out."""
    words = []
    for name, value in settings.items():
        spelled = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(spelled if value else "--no-" + spelled[2:])
        elif value is not None:
            words += [spelled, _joined(value) if isinstance(value, tuple) else str(value)]
    return words


def _joined(pieces: tuple[str, ...]) -> str:
    """The text that `given` takes apart into `pieces` again."""
    text = ",".join(pieces)
    return json.dumps(pieces) if text.startswith("[") or any("," in piece for piece in pieces) else text


def _kind_of(field: FieldInfo) -> tuple[Any, str | None]:
    """What typer should parse, and what its help should call it.

    Mixed types are left as text: pydantic reads them, and says better what is wrong.
    """
    annotation: Any = field.annotation
    parts = [part for part in get_args(annotation) if part is not type(None)] or [annotation]
    if get_origin(annotation) is Literal:
        return annotation, "CHOICE"  # which ones, says the help: a list of them here cuts the flags' names short
    if annotation is bool:
        return bool, ""  # the two spellings say enough
    if len(parts) > 1:
        return str, "|".join(_word(part) for part in parts)
    if _is_size(field):
        return str, "SIZE"
    if get_origin(parts[0]) is tuple:
        return str, "NAME,NAME"
    return parts[0], None


def _is_size(field: FieldInfo) -> bool:
    """Whether it is `Bytes`, which pydantic takes apart where None is no value of it."""
    return Bytes in get_args(field.annotation) or any(isinstance(mark, BeforeValidator) for mark in field.metadata)


def _word(kind: Any) -> str:
    return "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else str(kind.__name__).upper()


def _help_of(name: str, field: FieldInfo) -> str:
    """The description, with how a list is written, and the default and the range where there are any."""
    notes = [", ".join(map(str, get_args(field.annotation)))] if get_origin(field.annotation) is Literal else []
    notes += (
        ["each exactly as between the commas, or as a JSON list"] if _is_list(name) and name != "target_modules" else []
    )
    default = format_bytes(field.default) if field.default and _is_size(field) else _spelled(field.default)
    notes += [] if field.default is None else [f"default: {default}"]
    limits = ((word, getattr(limit, bound, None)) for limit in field.metadata for bound, word in _LIMITS.items())
    span = " ".join(word.format(_spelled(limit)) for word, limit in limits if limit is not None)
    notes += [span] if span else []
    return f"{field.description} ({'; '.join(notes)})" if notes else str(field.description)


def _spelled(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 2**32:
        return f"2**{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_list(name: str) -> bool:
    return name in RunConfig.model_fields and _kind_of(RunConfig.model_fields[name])[1] == "NAME,NAME"


def _pieces(name: str, text: str) -> tuple[str, ...]:
    """What a list holds: an option keeps the space that it begins with, the name of a layer has none."""
    if name == "target_modules":
        return tuple(piece.strip() for piece in text.split(",") if piece.strip())
    if not text.startswith("["):
        return tuple(text.split(","))
    try:
        pieces = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--{name} {text}: begins as a JSON list and is none: {error}") from None
    return tuple(map(str, pieces))
