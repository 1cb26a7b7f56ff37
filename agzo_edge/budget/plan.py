"""From a prediction to a decision: does the run fit, what would make it fit, and the refusal."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from agzo_edge.budget.detect import cache_folder, disk_room
from agzo_edge.budget.facts import ModelFacts
from agzo_edge.budget.job import UNKNOWN_DATA, DataShape, Where
from agzo_edge.budget.ladder import OFFLOADS, SMALLEST_LOGITS_CHUNK, SMALLEST_MLP_CHUNK, halvings, ladder, rung_words
from agzo_edge.budget.memory import InPieces, MemoryPlan, Saving, computes_on_cpu, job_of, predicted_memory
from agzo_edge.budget.profile import Profile
from agzo_edge.budget.qlora import qlora_need
from agzo_edge.config import RunConfig
from agzo_edge.errors import BudgetError, numbered
from agzo_edge.units import MIB, format_bytes

SHORTEST_ROW_TOKENS = 64  # shorter rows are no advice
SMALLEST_ADAPTER_RANK = 4
N_CHANGES = 3
N_LARGEST = 4  # components named in a refusal
_PIECES = ("--micro-batch-size", "--no-fuse-signs", "--logits-chunk", "--mlp-chunk-tokens")  # of the ladder

Predict = Callable[[RunConfig], MemoryPlan]
_Update = dict[str, Any]


class Rung(NamedTuple):
    """A way to take the run's steps, and the memory that it takes."""

    config: RunConfig
    plan: MemoryPlan


class FittedRun(NamedTuple):
    """A run that fits, what was changed for it, and what is left to change should memory get scarce."""

    config: RunConfig
    plan: MemoryPlan
    changes: tuple[str, ...]
    rungs: tuple[Rung, ...]  # this one first, each of the others in less memory than the one before


def memory_plan(
    facts: ModelFacts, config: RunConfig, profile: Profile, *, data: DataShape = UNKNOWN_DATA
) -> MemoryPlan:
    """The plan of the run that `config` describes on `profile`'s machine, what would save memory, and QLoRA's need.

    Raises ModelError when target_modules matches no layer, ConfigError for a limit or a device that the
    machine does not have.
    """
    predict = partial(predicted_memory, facts, profile=profile, data=data, room=disk_room(config.output_dir))
    plan = predict(config)
    kinds = _cheaper(config, facts, row_tokens=plan.row_tokens, on_cpu=computes_on_cpu(config, profile))
    return replace(
        plan,
        changes=_changes(plan, config, kinds, predict=predict),
        in_pieces=in_pieces(config, plan, predict),
        qlora=qlora_need(job_of(facts, config, profile, data=data)),
    )


def in_pieces(config: RunConfig, plan: MemoryPlan, predict: Predict) -> InPieces | None:
    """The first rung of the ladder that fits, None when `plan`, that of `config`, fits or no rung does."""
    if plan.fits:
        return None
    for rung in ladder(config, row_tokens=plan.row_tokens):
        if (tried := predict(rung)).fits:
            return InPieces(rung_words(config, rung), tried.device_bytes)
    return None


def require_fits(plan: MemoryPlan, *, in_smallest_pieces: int | None = None) -> None:
    """Return only when the plan fits. Raises BudgetError with the need, the limit, and what to try.

    `in_smallest_pieces` are the bytes of the device that the ladder's smallest rung takes.
    """
    if plan.fits:
        return
    where, need_bytes, limit_bytes = next(place for place in plan.limits if place[0] == plan.tightest)
    parts = sorted((part for part in plan.components if part.where == where), key=lambda part: -part.n_bytes)
    largest = [f"{part.name} {format_bytes(part.n_bytes)}: {part.formula}" for part in parts[:N_LARGEST]]
    need = f"the run needs {format_bytes(need_bytes)}"
    if where == "disk":
        raise BudgetError(
            f"{need} on the disk of its output directory, and {format_bytes(limit_bytes)} are free. The largest "
            f"parts:\n{numbered(largest)}\nMake room, or choose another --output-dir"
        )
    if where == "cache":
        raise BudgetError(
            f"{need} for what waits outside memory in {cache_folder()}, and {format_bytes(limit_bytes)} are free on "
            f"its disk. Make room, or set XDG_CACHE_HOME to a folder on another disk"
        )
    pieces, were_tried = "", False
    if where == "device" and in_smallest_pieces is not None and limit_bytes < in_smallest_pieces < need_bytes:
        pieces, were_tried = f", {format_bytes(in_smallest_pieces)} in the smallest pieces", True
    remedy = _remedy(plan, where, limit_bytes, pieces_were_tried=were_tried)
    raise BudgetError(
        f"{need} of {where} memory{pieces}, and profile '{plan.profile_name}' with its limits allows "
        f"{format_bytes(limit_bytes)}. The largest parts:\n{numbered(largest)}\n{remedy}"
    )


def _remedy(plan: MemoryPlan, where: Where, limit_bytes: int, *, pieces_were_tried: bool) -> str:
    """What to try, in lines; not what the ladder has tried."""
    if where == "device" and limit_bytes < plan.least_bytes:
        least = format_bytes(plan.least_bytes)
        return (
            f"The libraries and the largest layer's weights alone take {least}: raise the limit, or take a smaller "
            "model"
        )
    changes = [change for change in plan.changes if not (pieces_were_tried and change.flags.startswith(_PIECES))]
    if not changes:
        return "No setting saves any of it: raise the limit, or take a smaller model"
    offered = [change for change in changes if change.fits] or changes
    advice = [f"{change.flags} (saves {format_bytes(change.saved_bytes)})" for change in offered]
    remedy = "Each of these makes it fit:"
    if not any(change.fits for change in changes):
        remedy = "No single setting makes it fit: combine some, or take a smaller model. What saves most:"
    return f"{remedy}\n{numbered(advice)}"


def fitted_run(facts: ModelFacts, config: RunConfig, profile: Profile, *, data: DataShape = UNKNOWN_DATA) -> FittedRun:
    """The run on the first rung of the ladder that fits. Source: DESIGN section 4.

    Raises BudgetError, with the numbers of the run as asked for, when none does.
    """
    predict = partial(predicted_memory, facts, profile=profile, data=data, room=disk_room(config.output_dir))
    asked = predict(config)
    tried = [Rung(rung, predict(rung)) for rung in ladder(config, row_tokens=asked.row_tokens)]
    rungs: list[Rung] = []
    for rung in tried:
        if rung.plan.fits and (not rungs or rung.plan.device_bytes < rungs[-1].plan.device_bytes):
            rungs.append(rung)
    if not rungs:
        smallest = min(rung.plan.device_bytes for rung in tried)
        require_fits(memory_plan(facts, config, profile, data=data), in_smallest_pieces=smallest)
        raise AssertionError("a plan that does not fit was let through")
    fitted = rungs[0]
    changes: tuple[str, ...] = ()
    if fitted.config != config:
        changes = (
            f"{rung_words(config, fitted.config)}: the run as asked for needs {format_bytes(asked.device_bytes)}, "
            f"{format_bytes(asked.limit_bytes)} are allowed, and so it takes {format_bytes(fitted.plan.device_bytes)}",
        )
    return FittedRun(fitted.config, fitted.plan, changes, tuple(rungs))


def _changes(
    plan: MemoryPlan, config: RunConfig, kinds: Iterator[list[_Update]], *, predict: Predict
) -> tuple[Saving, ...]:
    """Up to three changes: the cheapest that make the plan fit, then those that save most where it does not.

    Of each kind the mildest that makes it fit is taken, or the strongest when none does.
    """
    where = plan.tightest
    fitting: list[Saving] = []
    saving: list[Saving] = []
    for updates in kinds:
        tried = [(update, predict(config.model_copy(update=update))) for update in updates]
        if not tried:
            continue
        update, best = next((pair for pair in tried if pair[1].fits), tried[-1])
        saved_bytes = plan.excess_bytes(where) - best.excess_bytes(where)
        flags = " ".join(_flag(name, value) for name, value in update.items() if name != "load_in_8bit")
        if saved_bytes > 0:
            (fitting if best.fits else saving).append(Saving(flags, saved_bytes, best.fits))
    saving.sort(key=lambda change: -change.saved_bytes)
    return tuple((fitting + saving)[:N_CHANGES])


def _cheaper(config: RunConfig, facts: ModelFacts, *, row_tokens: int, on_cpu: bool) -> Iterator[list[_Update]]:
    """Changes that save memory, the kind that costs least first; of each kind the mildest first."""
    yield [{"micro_batch_size": n} for n in halvings(config.micro_batch_size or config.batch_size, at_least=1)]
    if config.fuse_signs and config.difference != "exact":
        yield [{"fuse_signs": False}]
    chunk_tokens = min(config.mlp_chunk_tokens or row_tokens, row_tokens)
    yield [{"mlp_chunk_tokens": n} for n in halvings(chunk_tokens, at_least=SMALLEST_MLP_CHUNK)]
    yield [{"logits_chunk": n} for n in halvings(config.logits_chunk, at_least=SMALLEST_LOGITS_CHUNK)]
    quantizable = facts.stored_as == "dense"
    if quantizable and not config.load_in_4bit:
        yield [{"load_in_4bit": True, "load_in_8bit": False}]
    if quantizable and config.load_in_4bit and not config.double_quant:
        yield [{"double_quant": True}]
    if config.target == "dequantized":
        yield [{"target": "adapter"}]
    if config.difference == "exact":
        yield [{"difference": "central"}]
    if config.dtype == "float32" and not on_cpu:
        yield [{"dtype": "auto"}]
    yield [{"offload": place} for place in OFFLOADS[OFFLOADS.index(config.offload) + 1 :]]
    yield [{"max_seq_length": n} for n in halvings(row_tokens, at_least=SHORTEST_ROW_TOKENS)]
    yield [{"adapter_rank": n} for n in halvings(config.adapter_rank, at_least=SMALLEST_ADAPTER_RANK)]


def _flag(name: str, value: Any) -> str:
    """A change as it is written on the command line."""
    spelled = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{spelled}" if value else f"--no-{spelled}"
    return f"--{spelled} {value // MIB}MiB" if name == "logits_chunk" else f"--{spelled} {value}"
