"""A model to be used: with an adapter, on the base that it was trained on and as that was held, inside its budget."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from agzo_edge.budget.facts import ModelFacts
from agzo_edge.budget.plan import Rung
from agzo_edge.config import RunConfig
from agzo_edge.data_config import PromptForm
from agzo_edge.errors import AdapterError
from agzo_edge.model.branch import set_learned
from agzo_edge.model.load import load_model
from agzo_edge.model.memory import refused_as_budget
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.preparation import fitted_here, on_adapters_layers
from agzo_edge.record.adapter import base_model_of
from agzo_edge.record.files import atomic_write_text
from agzo_edge.record.journal import read_header
from agzo_edge.record.strict_json import strict_object
from agzo_edge.rundir import JOURNAL_NAME, PROMPT_FORM, load_changes, require_ended

SETTINGS_NAME = "run_settings.json"  # beside an adapter that was taken out of its run's directory

# Settings by which a run holds its base, and those by which it makes rows and scores them.
_OF_BASE = ("load_in_4bit", "load_in_8bit", "quant_type", "double_quant")
_OF_ROWS = (
    *("objective", "prompt_template", "completion_template", "options", "labels", "answer_field", "line_pattern"),
    *("train_on", "mask_prompt", "max_seq_length", "overlong", "preference_loss", "beta"),
    *("reward", "reward_argument", "reward_timeout_s", "max_new_tokens", "temperature"),
)


def base_of(adapter: Path) -> str | None:
    """The base model that an adapter names, if any. Raises AdapterError for no adapter, and for a run without one."""
    require_ended(adapter)
    return base_model_of(adapter)


def settings_in(directory: Path) -> Mapping[str, Any]:
    """The settings of the run that made the adapter in `directory`, or in a folder of the run's; none where unknown.

    With them, how its rows asked.
    """
    if (directory / SETTINGS_NAME).is_file():
        try:
            return strict_object((directory / SETTINGS_NAME).read_bytes())
        except (OSError, ValueError):
            return {}
    journals = (place / JOURNAL_NAME for place in (directory, directory.absolute().parent))
    found = next((path for path in journals if path.is_file()), None)
    header = None if found is None else read_header(found)
    return settings_of(header) if header else {}


def settings_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a journal's header, and how the run's rows asked."""
    settings, form = header.get("config"), header.get(PROMPT_FORM)
    if not isinstance(settings, dict):
        return {}
    return {**settings, PROMPT_FORM: form} if form in get_args(PromptForm) else settings


def settings_of_run(adapter: Path, given: Mapping[str, Any], *, data_too: bool) -> dict[str, Any]:
    """How the run that made an adapter held its base, and, with `data_too`, made and scored its rows.

    Nothing for an adapter from elsewhere, and nothing that `given` settings replace. Raises AdapterError where the run
    was scored by Python code: an adapter, which may be anybody's, does not say what code is run.
    """
    settings = settings_in(adapter)
    given = {name: value for name, value in given.items() if value is not None}
    names: set[str] = set()
    if not {"load_in_4bit", "load_in_8bit"} & given.keys():
        names |= {*_OF_BASE}
    if data_too and given.get("objective") in (None, settings.get("objective")):
        names |= {*_OF_ROWS} - ({"labels"} if "options" in given else set())
    taken = {name: value for name, value in settings.items() if name in names}
    _refuse_unnamed_code(adapter, taken, given)
    return taken


def prompt_form_of(adapter: Path) -> PromptForm | None:
    """How the rows that an adapter has learned from asked the model; None where nothing tells."""
    form = settings_in(adapter).get(PROMPT_FORM)
    return form if form in get_args(PromptForm) else None


def settings_to_resume(directory: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the run in `directory`; nothing where there is none. What lets code run must be `given` again.

    Raises AdapterError where the run was rewarded by Python code that is not named.
    """
    if not (directory / JOURNAL_NAME).is_file():
        return {}
    unsettled = {"output_dir", "trust_remote_code", PROMPT_FORM}  # the directory may have been moved
    settings = {name: value for name, value in settings_in(directory).items() if name not in unsettled}
    _refuse_unnamed_code(directory, settings, given)
    return settings


def keep_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Leave beside an adapter, taken out of its run's directory, how the run held its base and made its rows."""
    kept = {name: settings[name] for name in (*_OF_BASE, *_OF_ROWS, PROMPT_FORM) if name in settings}
    if kept:
        atomic_write_text(directory / SETTINGS_NAME, json.dumps(kept, indent=2) + "\n")


def _refuse_unnamed_code(place: Path, taken: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise AdapterError where `taken` settings, which may be anybody's, would run Python code as a reward."""
    reward = taken.get("reward")
    if isinstance(reward, str) and ":" in reward and "reward" not in given:
        raise AdapterError(
            f"{place}: its run was rewarded by {reward}, code that is run only when you name it: "
            f"--reward {shlex.quote(reward)}"
        )


def loaded_model(facts: ModelFacts, config: RunConfig, adapter: Path | None) -> tuple[EdgeModel, Sequence[Rung]]:
    """The model of `config` and `facts`, with an adapter on it, and the ways to work with it inside its budget.

    Raises BudgetError, AdapterError and ModelError.
    """
    changes = {} if adapter is None else load_changes(adapter)
    config = on_adapters_layers(config.model_copy(update={"guide": "none", "target_modules": None}), changes, facts)
    fitted, _ = fitted_here(facts, config)
    with refused_as_budget(fitted.plan):
        loaded = load_model(str(config.model), fitted.config, trains=False)
    set_learned(loaded.branches, changes)
    return loaded, fitted.rungs
