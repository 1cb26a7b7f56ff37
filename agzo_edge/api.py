"""The public verbs. The command line calls these, and so can any program.

A setting is a keyword argument with the name of a field of `RunConfig`; config.py tells them all.
"""

from collections.abc import Callable, Container, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agzo_edge.budget.detect import machine_profile
from agzo_edge.budget.facts import ModelFacts, model_facts
from agzo_edge.budget.memory import MemoryPlan
from agzo_edge.budget.plan import memory_plan
from agzo_edge.budget.sweep import Sweep, memory_sweep
from agzo_edge.config import RunConfig, config_from, read_toml
from agzo_edge.demo import DATA_DIR, MODEL_DIR, TRAIN_NAME, demo_directory, demo_settings
from agzo_edge.errors import ConfigError, ModelError
from agzo_edge.paths import expanded
from agzo_edge.presets import PRESETS
from agzo_edge.train.source import require_place
from agzo_edge.verbs import with_torch_as_ours

if TYPE_CHECKING:  # these load torch, which planning does without
    from agzo_edge.events import Event, Run
    from agzo_edge.serve.generate import TextModel
    from agzo_edge.train.evaluate import Metrics
    from agzo_edge.train.fidelity import Fidelity


def resolve(
    settings: Mapping[str, Any],
    *,
    config_file: str | Path | None = None,
    preset: str | None = None,
    resume: bool = False,
    of_run: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The run that `settings` describe: built-in < preset < profile < those `of_run` < file < `settings`.

    To `resume` is to take the settings of the run in the output directory for those `of_run`. Without a model it is
    the embedded demo, in a directory of its own, or its last one to resume. Raises ConfigError with every fault,
    AdapterError for a run that was rewarded by code which `settings` do not name.
    """
    in_file = read_toml(Path(config_file)) if config_file else {}
    in_file_preset = in_file.pop("preset", None)
    preset = preset or in_file_preset
    given = in_file | {name: value for name, value in settings.items() if value is not None}
    taken = dict(of_run or {})
    is_demo = given.get("model") in (None, str(MODEL_DIR)) and given.get("data") is None
    directory = given.get("output_dir") or (demo_directory(resume=resume) if is_demo else None)
    if resume and directory:
        from agzo_edge.loading import settings_to_resume  # loads torch

        begun = settings_to_resume(_path(directory), given)
        if is_demo and "output_dir" in given and not begun:
            raise ConfigError(f"{directory}: holds no run to go on with: name --model and --data to begin one")
        named = PRESETS.get(preset, {}) if begun and isinstance(preset, str) else {}
        taken |= begun | dict(named)  # the run's own is among its settings; another is refused, setting by setting
    if given.get("data") is not None and (taken | given).get("model") is None:
        raise ConfigError("data is given and no model: name one with --model, or give neither for the demo")
    if is_demo:
        taken = demo_settings() | {"output_dir": directory} | taken
    machine = machine_profile(str((taken | given).get("profile", "auto")))
    return config_from(machine.settings, taken, in_file, settings, preset=preset or "default")


def plan(
    model: str | None = None,
    *,
    config_file: str | Path | None = None,
    preset: str | None = None,
    **settings: Any,
) -> MemoryPlan:
    """The memory that a run would need, from the checkpoint's headers alone: nothing is loaded.

    Raises ConfigError, ModelError and DataError; a plan that does not fit is returned, with `fits` False.
    """
    config = resolve({"model": model, **settings}, config_file=config_file, preset=preset)
    return memory_plan(_facts_to_train(config), config, machine_profile(config.profile))


def sweep(
    model: str | None = None,
    *,
    config_file: str | Path | None = None,
    preset: str | None = None,
    **settings: Any,
) -> Sweep:
    """What fits: the plans of a run with rows of 128 to 16,384 tokens and steps of 1 to 64 examples.

    Raises ConfigError and ModelError.
    """
    config = resolve({"model": model, **settings}, config_file=config_file, preset=preset)
    return memory_sweep(_facts_to_train(config), config, machine_profile(config.profile))


def _facts_to_train(config: RunConfig) -> ModelFacts:
    """The facts of a run's model. Raises ModelError where it cannot be trained so, and DataError for data not there."""
    for source in (config.data, config.eval_data):
        if source is not None:
            require_place(source)
    facts = model_facts(str(config.model))
    if config.adapter is None:  # which would bring its own layers
        facts.require_trainable(config.target_modules)
    return facts


@with_torch_as_ours
def finetune(
    model: str | None = None,
    data: str | None = None,
    *,
    config_file: str | Path | None = None,
    preset: str | None = None,
    resume: bool = False,
    observe: "Callable[[Event], None] | None" = None,
    **settings: Any,
) -> "Run":
    """Fine-tune `model` on `data` inside the memory budget, and leave an adapter in `output_dir`.

    `observe` is called with every event of events.py: `show_progress()` prints them. `resume` goes on with an
    interrupted run. Raises BudgetError before anything is loaded when the plan does not fit, UsageError before anything
    is written when model, data or settings cannot be used.
    """
    from agzo_edge.events import Finished
    from agzo_edge.session import training

    config = resolve({"model": model, "data": data, **settings}, config_file=config_file, preset=preset, resume=resume)
    for event in training(config, resume=resume):
        if observe is not None:
            observe(event)
        if isinstance(event, Finished):
            return event.run
    raise AssertionError("a run ended without its last event")


@with_torch_as_ours
def load(model: str | None = None, *, adapter: str | Path | None = None, **settings: Any) -> "TextModel":
    """A quantized model with its adapter, ready to write text: `load(...).generate(prompt)`.

    The adapter of a run finds the base that it was trained on, held as it was then, unless `model` or `settings` say
    otherwise. Prompts are put as the rows of that run put them, by the chat template, under Alpaca's
    headings or as they stand.
    """
    from agzo_edge.loading import loaded_model, prompt_form_of
    from agzo_edge.serve.generate import TextModel

    path = None if adapter is None else _path(adapter)
    config = _of_use(path, {"model": model, **settings}).model_copy(update={"batch_size": 1, "micro_batch_size": 1})
    loaded, _ = loaded_model(model_facts(str(config.model)), config, path)
    return TextModel(loaded, form=None if path is None else prompt_form_of(path))


@with_torch_as_ours
def evaluate(
    model: str | None = None, data: str | None = None, *, adapter: str | Path | None = None, **settings: Any
) -> "Metrics":
    """Loss and perplexity, or accuracy, of a model with its adapter on `data`, inside the memory budget.

    The adapter of a run is scored by that run's objective, its rows made by its settings, unless `settings` name one.
    """
    from agzo_edge.evaluations import metrics_of
    from agzo_edge.loading import loaded_model
    from agzo_edge.train.examples import load_examples
    from agzo_edge.train.goal import goal_of
    from agzo_edge.train.guard import Guard
    from agzo_edge.train.reward import refused_as_data

    path = None if adapter is None else _path(adapter)
    config = _of_use(path, {"model": model, "data": data, **settings}, data_too=True)
    if config.data is None and config.eval_data is None:
        raise ConfigError("there is nothing to evaluate on: name a file with --data")
    facts = model_facts(str(config.model))
    loaded, rungs = loaded_model(facts, config, path)
    examples = load_examples(
        str(config.eval_data or config.data),
        loaded.tokenizer,
        config,
        split="validation" if config.eval_data else "test",
        facts=facts,
    )
    loaded.require_positions(examples.report.longest_tokens + config.written_tokens)
    with closing(goal_of(config)) as goal, refused_as_data():
        return metrics_of(loaded, examples.examples, goal, guard=Guard(loaded, rungs))


def _of_use(adapter: Path | None, settings: Mapping[str, Any], *, data_too: bool = False) -> RunConfig:
    """The settings to use a model by: with an adapter, its run's below the given ones."""
    from agzo_edge.loading import base_of, settings_of_run

    if adapter is None:
        return resolve(settings)
    base = base_of(adapter)
    model = settings["model"] or base
    if model is None:
        raise ModelError(f"{adapter}: names no base model: give its directory or hub id with --model")
    return resolve({**settings, "model": model}, of_run=settings_of_run(adapter, settings, data_too=data_too))


def _path(name: str | Path) -> Path:
    return Path(expanded(str(name)))


@with_torch_as_ours
def replay(
    run: str | Path,  # the directory of a run, or a file that `export(..., to="replay")` wrote
    *,
    output: str | Path | None = None,
    until_step: int | None = None,
    skip: Container[int] = (),
) -> Path:
    """Rebuild a run's adapter from its journal and bases alone, into `output`: RUN/replayed, or FILE-replayed.

    No data, no model and no forward pass. `until_step` gives the adapter of an earlier step; `skip` leaves steps
    out, for the sgd optimizer. Raises AdapterError when the run's files are damaged.
    """
    from agzo_edge.loading import keep_settings, settings_of
    from agzo_edge.rebuild import learned_in
    from agzo_edge.rundir import require_unused, save_result

    source = _path(run)
    beside = source.with_name(f"{source.stem}-replayed") if source.is_file() else source / "replayed"
    target = _path(output) if output else beside
    require_unused(target, flag="--output")
    learner, header = learned_in(source, until_step=until_step, skip=skip)
    save_result(target, learner, header, card=f"Rebuilt by `agzo-edge replay` from {source.name}.\n")
    keep_settings(target, settings_of(header))
    return target


@with_torch_as_ours
def export(
    adapter: str | Path, *, to: str, output: str | Path, model: str | None = None, dtype: str | None = None
) -> Path:
    """Write an adapter in another form: `peft`, `merged` (a full checkpoint), `gguf` (for llama.cpp), or `replay`.

    `replay` takes the directory of a run and writes one safetensors file from which `replay` rebuilds the adapter.
    `dtype` is what tensors are stored as, by default float32, and of a merged model what its base is stored as.
    """
    from agzo_edge.loading import keep_settings, settings_in
    from agzo_edge.rebuild import replay_file_of
    from agzo_edge.record.replay_file import save_replay
    from agzo_edge.rundir import require_ended
    from agzo_edge.serve.export import export_adapter

    source, target = _path(adapter), _path(output)
    if to != "replay":
        require_ended(source)
        export_adapter(source, to=to, output=target, model_source=model, dtype=dtype)
        if to == "peft":
            keep_settings(target, settings_in(source))
        return target
    if dtype is not None:
        raise ConfigError("to is replay, which has no dtype: it is the run as it was")
    if target.exists():
        raise ConfigError(f"{target} exists: name a new file")
    save_replay(target, replay_file_of(source))
    return target


def report(run_dir: str | Path) -> dict[str, Any]:
    """What a run cost and gave: report.json of a finished run, the journal's account of an interrupted one.

    Raises AdapterError for a directory that holds no run, or a damaged one.
    """
    from agzo_edge.run_report import run_report

    return run_report(_path(run_dir))


def doctor() -> dict[str, Any]:
    """What this machine has, what is free, and what is missing with the command that installs it."""
    from agzo_edge.serve.doctor import examination

    return examination()


@with_torch_as_ours
def check_numerics(model: str | None = None, data: str | None = None, **settings: Any) -> "Fidelity":
    """How far finite differences are from the exact derivative, over mu, with `model` on this machine.

    Without `data` on the demo's. Raises BudgetError when a step with exact differences does not fit.
    """
    from agzo_edge.checkup import fidelity_of

    if model is not None and data is None:
        data = str(DATA_DIR / TRAIN_NAME)
    return fidelity_of(resolve({"model": model, "data": data, **settings}))
