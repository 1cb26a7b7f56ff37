"""What is settled before anything is loaded: a run's data, and the plan that fits them to the machine."""

import shlex
from collections.abc import Mapping, Sequence
from functools import partial

from agzo_edge.budget.detect import machine_profile
from agzo_edge.budget.facts import ModelFacts
from agzo_edge.budget.job import UNKNOWN_DATA, DataShape
from agzo_edge.budget.plan import FittedRun, fitted_run
from agzo_edge.config import RunConfig
from agzo_edge.events import Planned
from agzo_edge.model.load import load_tokenizer
from agzo_edge.model.setup import on_planned_device, require_usable_device
from agzo_edge.numerics.lowrank import LowRank
from agzo_edge.train.data import ExampleSet
from agzo_edge.train.examples import load_examples
from agzo_edge.train.source import unused_validation


def run_data(config: RunConfig, facts: ModelFacts) -> tuple[ExampleSet, ExampleSet | None]:
    """The training examples, and the held-out ones where they are given. Raises DataError with all faults."""
    tokenizer = load_tokenizer(str(config.model), config)
    load = partial(load_examples, tokenizer=tokenizer, config=config, facts=facts)
    data = load(str(config.data), split="train")
    return data, load(config.eval_data, split="validation") if config.eval_data else None


def on_adapters_layers(config: RunConfig, changes: Mapping[str, LowRank], facts: ModelFacts) -> RunConfig:
    """The run on the layers of the adapter that it begins with, where it names none itself.

    Whether these can be guided, and the rank that goes with it, is settled as where they are named.
    """
    layers = tuple(name for name in changes if name in facts.linears)  # what does not fit is told of as such
    if config.target_modules or not layers:
        return config
    guide = "auto" if config.guide == "head" else "none"
    return RunConfig(**{**config.model_dump(exclude_unset=True), "target_modules": layers, "guide": guide})


def planned_run(
    config: RunConfig, facts: ModelFacts, data: Sequence[ExampleSet], *, to_know: tuple[str, ...] = ()
) -> Planned:
    """The plan of a run on this data that fits its machine, with what had to change for it, and what else `to_know`.

    Raises BudgetError when nothing fits, ConfigError for a GPU that cannot be used or is not there.
    """
    fitted, notes = fitted_here(facts, config, data=data_shape(data))
    if config.eval_data is None and (beside := unused_validation(str(config.data))):
        flag = f"--eval-data {shlex.quote(str(config.data))}"
        to_know = (*to_know, f"{beside.name} lies beside the training rows and is not used: {flag}")
    to_know = (*to_know, *fitted.plan.notes, *notes)
    return Planned(fitted.config, fitted.plan, fitted.plan.profile_name, fitted.changes, fitted.rungs, to_know)


def fitted_here(
    facts: ModelFacts, config: RunConfig, *, data: DataShape = UNKNOWN_DATA
) -> tuple[FittedRun, tuple[str, ...]]:
    """The run as it fits its machine, on the device that the plan is for, and what a person should know of that device.

    Raises BudgetError when nothing fits, ConfigError for a GPU that cannot be used or is not there.
    """
    machine = machine_profile(config.profile)
    notes = require_usable_device(config, machine)
    return fitted_run(facts, on_planned_device(config, machine), machine, data=data), notes


def data_shape(data: Sequence[ExampleSet]) -> DataShape:
    """What a plan must know of the data; of a streamed file, of which nobody has seen all rows, its lines."""
    held = [part for part in data if not part.report.streamed]
    return DataShape(
        rows_per_example=max(part.report.rows_per_example for part in data),
        longest_tokens=max(part.report.longest_tokens for part in data),
        label_tokens=max(part.most_label_tokens for part in held) if len(held) == len(data) else None,
        n_bytes=sum(part.n_bytes for part in held),
        indexed_lines=max(part.report.rows_read if part.report.streamed else 0 for part in data),
    )
