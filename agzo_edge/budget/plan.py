"""From a prediction to a decision: does the run fit, what would make it fit, and the refusal."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from agzo_edge.budget.facts import ModelFacts
from agzo_edge.budget.ladder import halvings, ladder, rung_words
from agzo_edge.budget.memory import Change, InPieces, MemoryPlan, computes_on_cpu, job_of, predicted_memory
from agzo_edge.budget.profile import Profile
from agzo_edge.budget.qlora import qlora_need
from agzo_edge.config import RunConfig
from agzo_edge.errors import BudgetError, numbered
from agzo_edge.units import format_bytes

SHORTEST_ROW_TOKENS = 64  # shorter rows are no advice
SMALLEST_ADAPTER_RANK = 4
N_CHANGES = 3
N_LARGEST = 4  # components named in a refusal

Predict = Callable[[RunConfig], MemoryPlan]
_Variant = tuple[str, RunConfig]  # flags, and the settings with them


class Rung(NamedTuple):
    """A way to take the run's steps, and the memory that it takes."""

    config: RunConfig
    plan: MemoryPlan


class FittedRun(NamedTuple):
    """A run that fits, what was changed for it, and what is left to change should memory get scarce."""

    config: RunConfig
    plan: MemoryPlan
    notes: tuple[str, ...]
    rungs: tuple[Rung, ...]  # this one first, each of the others in less memory than the one before


def memory_plan(
    facts: ModelFacts,
    config: RunConfig,
    profile: Profile,
    *,
    rows_per_example: int = 1,  # 1 for lm; the most options of an example for choice
    longest_tokens: int | None = None,  # of the data, where it is known; max_seq_length otherwise
    indexed_lines: int = 0,  # of a data file that is too large to be held
) -> MemoryPlan:
    """The plan of the run that `config` describes on `profile`'s machine, what would save memory, and QLoRA's need.

    Raises ModelError when target_modules matches no layer.
    """
    sizes: dict[str, Any] = {
        "rows_per_example": rows_per_example,
        "longest_tokens": longest_tokens,
        "indexed_lines": indexed_lines,
    }
    predict = _predictor(facts, profile, sizes)
    plan = predict(config)
    job = job_of(facts, config, profile, **sizes)
    changes = _changes(plan, _cheaper(config, facts, profile), predict)
    return replace(plan, changes=changes, in_pieces=in_pieces(config, plan, predict), qlora=qlora_need(job))


def in_pieces(config: RunConfig, plan: MemoryPlan, predict: Predict) -> InPieces | None:
    """The first rung of the ladder that fits, None when `plan`, that of `config`, fits or no rung does."""
    if plan.fits:
        return None
    for rung in ladder(config, row_tokens=plan.row_tokens):
        if (tried := predict(rung)).fits:
            return InPieces(rung_words(config, rung), tried.device_bytes)
    return None


def require_fits(plan: MemoryPlan) -> None:
    """Return only when the plan fits. Raises BudgetError with the need, the limit, and what to try."""
    if plan.fits:
        return
    where, limit_bytes = "device", plan.limit_bytes
    if plan.headroom_bytes >= 0 and plan.host_limit_bytes is not None:
        where, limit_bytes = "host", plan.host_limit_bytes
    parts = sorted((part for part in plan.components if part.where == where), key=lambda part: -part.n_bytes)
    need_bytes = sum(part.n_bytes for part in parts)
    largest = [f"{part.name} {format_bytes(part.n_bytes)}: {part.formula}" for part in parts[:N_LARGEST]]
    offered = [change for change in plan.changes if change.fits] or plan.changes
    advice = [f"{change.flags} (saves {format_bytes(change.saved_bytes)})" for change in offered]
    remedy = "Each of these makes it fit:"
    if not any(change.fits for change in plan.changes):
        remedy = "No single setting makes it fit: combine some, or take a smaller model. What saves most:"
    raise BudgetError(
        f"the run needs {format_bytes(need_bytes)} of {where} memory, and profile '{plan.profile_name}' "
        f"with its limits allows {format_bytes(limit_bytes)}. The largest parts:\n"
        f"{numbered(largest)}\n{remedy}\n{numbered(advice)}"
    )


def fitted_run(
    facts: ModelFacts,
    config: RunConfig,
    profile: Profile,
    *,
    rows_per_example: int = 1,
    longest_tokens: int | None = None,
    indexed_lines: int = 0,
) -> FittedRun:
    """The run on the first rung of the ladder that fits. Source: DESIGN section 4.

    Raises BudgetError, with the numbers of the run as asked for, when none does.
    """
    sizes: dict[str, Any] = {
        "rows_per_example": rows_per_example,
        "longest_tokens": longest_tokens,
        "indexed_lines": indexed_lines,
    }
    predict = _predictor(facts, profile, sizes)
    asked = predict(config)
    rungs: list[Rung] = []
    for rung in ladder(config, row_tokens=asked.row_tokens):
        plan = predict(rung)
        if plan.fits and (not rungs or plan.device_bytes < rungs[-1].plan.device_bytes):
            rungs.append(Rung(rung, plan))
    if not rungs:
        require_fits(memory_plan(facts, config, profile, **sizes))
        raise AssertionError("a plan that does not fit was let through")
    fitted = rungs[0]
    notes: tuple[str, ...] = ()
    if fitted.config != config:
        notes = (
            f"{rung_words(config, fitted.config)}: the run as asked for needs {format_bytes(asked.device_bytes)}, "
            f"{format_bytes(asked.limit_bytes)} are allowed, and so it takes {format_bytes(fitted.plan.device_bytes)}",
        )
    return FittedRun(fitted.config, fitted.plan, notes, tuple(rungs))


def _predictor(facts: ModelFacts, profile: Profile, sizes: Mapping[str, Any]) -> Predict:
    """What predicts the memory of a run on this machine by its settings; `sizes` are those of its data."""
    return lambda config: predicted_memory(facts, config, profile, **sizes)


def _changes(plan: MemoryPlan, kinds: Iterator[list[_Variant]], predict: Predict) -> tuple[Change, ...]:
    """Up to three changes: the cheapest that make the plan fit, then those that save most.

    Of each kind the mildest that makes it fit is taken, or the strongest when none does.
    """
    fitting: list[Change] = []
    saving: list[Change] = []
    for variants in kinds:
        tried = [(flags, predict(config)) for flags, config in variants]
        flags, best = next((pair for pair in tried if pair[1].fits), tried[-1] if tried else ("", plan))
        saved_bytes = plan.device_bytes - best.device_bytes
        if saved_bytes > 0:
            (fitting if best.fits else saving).append(Change(flags, saved_bytes, best.fits))
    saving.sort(key=lambda change: -change.saved_bytes)
    return tuple((fitting + saving)[:N_CHANGES])


def _cheaper(config: RunConfig, facts: ModelFacts, profile: Profile) -> Iterator[list[_Variant]]:
    """Changes that save memory, the kind that costs least first; of each kind the mildest first."""
    micro = config.micro_batch_size or config.batch_size
    yield [_changed(config, micro_batch_size=size) for size in halvings(micro, at_least=1)]
    quantizable = facts.stored_as == "dense"
    if quantizable and not config.load_in_4bit:
        yield [_changed(config, load_in_4bit=True, load_in_8bit=False)]
    if quantizable and config.load_in_4bit and not config.double_quant:
        yield [_changed(config, double_quant=True)]
    if config.target == "dequantized":
        yield [_changed(config, target="adapter")]
    if config.difference == "exact":
        yield [_changed(config, difference="central")]
    if config.dtype == "float32" and not computes_on_cpu(config, profile):
        yield [_changed(config, dtype="auto")]
    lengths = halvings(config.max_seq_length, at_least=SHORTEST_ROW_TOKENS)
    yield [_changed(config, max_seq_length=length) for length in lengths]
    ranks = halvings(config.adapter_rank, at_least=SMALLEST_ADAPTER_RANK)
    yield [_changed(config, adapter_rank=rank) for rank in ranks]


def _changed(config: RunConfig, **update: Any) -> _Variant:
    """The flags that make the change, and the settings after it."""
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in update.items()
        if value is not False
    ]
    return " ".join(flags), config.model_copy(update=update)
