"""A model to be used: with an adapter, on the base that it was trained on and as that was held, inside its budget."""

from pathlib import Path
from typing import Any

from agzo_edge.budget.detect import machine_profile
from agzo_edge.budget.facts import model_facts
from agzo_edge.budget.plan import fitted_run
from agzo_edge.config import HELD_BY, RunConfig
from agzo_edge.data_config import DataConfig
from agzo_edge.errors import AdapterError
from agzo_edge.model.branch import set_learned
from agzo_edge.model.load import load_model
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.model.setup import require_usable_device
from agzo_edge.preparation import on_adapters_layers
from agzo_edge.record.adapter import base_model_of
from agzo_edge.rundir import header_in, is_unfinished, load_changes


def base_of(adapter: Path) -> str | None:
    """The base model that an adapter names, if any. Raises AdapterError for no adapter, and for a run without one."""
    if is_unfinished(adapter):
        raise AdapterError(
            f"{adapter}: the run has not ended: go on with it by `train --resume-from-checkpoint`, or make the adapter "
            f"of its steps so far with `agzo-edge replay {adapter}`"
        )
    return base_model_of(adapter)


def settings_of_run(adapter: Path, *, data_too: bool) -> dict[str, Any]:
    """How the run that made an adapter held its base, and, with `data_too`, made and scored its rows.

    Nothing for an adapter from elsewhere. Raises AdapterError for a damaged journal.
    """
    header = header_in(adapter)
    if header is None:
        return {}
    names = {*HELD_BY, *(DataConfig.model_fields.keys() - {"data", "eval_data"} if data_too else ())}
    return {name: value for name, value in header["config"].items() if name in names}


def loaded_model(config: RunConfig, adapter: Path | None) -> EdgeModel:
    """The model of `config`, with an adapter on it. Raises BudgetError, AdapterError and ModelError."""
    changes = {} if adapter is None else load_changes(adapter)
    facts = model_facts(str(config.model))
    config = on_adapters_layers(config.model_copy(update={"guide": "none", "target_modules": None}), changes, facts)
    machine = machine_profile(config.profile)
    require_usable_device(config, machine)
    fitted = fitted_run(facts, config, machine)
    loaded = load_model(str(config.model), fitted.config, trains=False)
    set_learned(loaded.branches, changes)
    return loaded
