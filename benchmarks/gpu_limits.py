"""Runs inside imitated cards: what fits, how it is done and how fast, and how long the rows may be beside QLoRA's."""

from functools import partial
from typing import Any

from gpu_baselines import qlora_step
from gpu_measure import Row, Rows, attempted, in_turns, timing
from gpu_models import Setting, facts_of_shape, random_model, shapes
from gpu_steps import MU, batches
from step_cost import random_examples

from agzo_edge.budget.detect import machine_profile
from agzo_edge.budget.job import DataShape
from agzo_edge.budget.plan import FittedRun, fitted_run
from agzo_edge.config import RunConfig
from agzo_edge.model.memory import capped
from agzo_edge.model.offload import settle
from agzo_edge.train.data import Example, micro_batches
from agzo_edge.train.goal import goal_of
from agzo_edge.train.guard import Guard
from agzo_edge.train.learner import Learner
from agzo_edge.train.step import agzo_step
from agzo_edge.units import GIB

LIMITS_GIB = (4, 6, 8, 12, 16, 24)
MODELS = ("qwen3-1.7b", "qwen3-4b", "llama-3.1-8b", "qwen3-14b")
EXAMPLES, TOKENS = 4, 1024
CONTEXT_MODEL, CONTEXT_LIMIT_GIB = "llama-3.1-8b", 8
CONTEXTS = tuple(2**power for power in range(10, 18))  # 1,024 to 131,072 tokens, one example


def limits(setting: Setting) -> Rows:
    """A few steps of each model inside each limit, under the budget's own cap, on the first rung that fits.

    The limit holds for all that the driver counts for this process. `not_run` with BudgetError is a refusal.
    """
    for shape in ("tiny",) if setting.small else MODELS:
        for limit in (1,) if setting.small else LIMITS_GIB:
            about = {"model": shape, "limit_gib": limit, "examples": EXAMPLES, "tokens_of_each": TOKENS}
            tokens = 16 if setting.small else TOKENS
            yield attempted(
                setting, about | {"tokens_of_each": tokens}, partial(_limited, setting, shape, limit * GIB, tokens)
            )


def _limited(setting: Setting, shape: str, limit_bytes: int, tokens: int) -> Row:
    """The steps inside the limit: how, how fast, and the peak beside plan and limit."""
    fitted = _fitted(setting, shape, limit_bytes, examples=EXAMPLES, tokens=tokens)
    model = random_model(shape, fitted.config)
    return _guarded_steps(setting, model, fitted, _rows(shape, EXAMPLES, tokens))


def _fitted(setting: Setting, shape: str, limit_bytes: int, *, examples: int, tokens: int) -> FittedRun:
    """The run on the first rung that fits. Raises BudgetError when none does."""
    limit = {"vram_limit": limit_bytes} if setting.on_gpu else {"ram_limit": limit_bytes}
    config = setting.config(batch_size=examples, max_seq_length=tokens, on_overflow="stream", **limit)
    return fitted_run(facts_of_shape(shape), config, machine_profile("auto"), data=DataShape(longest_tokens=tokens))


def _rows(shape: str, n: int, tokens: int) -> list[Example]:
    return random_examples(n, tokens=tokens, vocab=shapes()[shape].vocab_size)


def _guarded_steps(setting: Setting, model: Any, fitted: FittedRun, examples: list[Example]) -> Row:
    """Steps under the guard, which caps the allocator and may step down."""
    setting.free()
    guard, learner = Guard(model, fitted.rungs), Learner(model.branches, fitted.config)

    def step(config: RunConfig) -> None:
        size = config.micro_batch_size or config.batch_size
        parts = list(micro_batches(examples, micro_batch_size=size, pad_id=0, objective="lm"))
        # step 0 opens a window: the most that one needs
        agzo_step(model, parts, learner, step=0, mu=MU, config=config, goal=goal_of(config))

    guard.rehearse(step)
    times = in_turns(setting, {"step": lambda: guard.run(step)}, repetitions=1 if setting.small else 2)["step"]
    config = guard.config
    return timing(times) | {
        "peak_bytes": guard.peak_bytes,
        "planned_bytes": fitted.plan.device_bytes,
        "peak_over_plan": guard.peak_bytes / fitted.plan.device_bytes,
        "changed": [*fitted.changes, *guard.take_moves()],
        "offload": config.offload,
        "micro_batch_size": config.micro_batch_size,
        "fuse_signs": config.fuse_signs,
    }


def contexts(setting: Setting) -> Rows:
    """How long one row may be within the limit: ours on whatever rung fits, and QLoRA under the same cap.

    Lengths double until one does not fit; QLoRA's needs no plan: it fits when its step stays within the cap.
    """
    shape = "tiny" if setting.small else CONTEXT_MODEL
    limit = 1 if setting.small else CONTEXT_LIMIT_GIB
    for method, measured in (("ours", _context_of_ours), ("qlora", _context_of_qlora)):
        for tokens in (16,) if setting.small else CONTEXTS:
            about = {"method": method, "model": shape, "limit_gib": limit, "tokens": tokens}
            row = attempted(setting, about, partial(measured, setting, shape, limit * GIB, tokens))
            yield row
            if "not_run" in row:
                break


def _context_of_ours(setting: Setting, shape: str, limit_bytes: int, tokens: int) -> Row:
    fitted = _fitted(setting, shape, limit_bytes, examples=1, tokens=tokens)
    model = random_model(shape, fitted.config)
    settle(model, fitted.config)
    return _guarded_steps(setting, model, fitted, _rows(shape, 1, tokens))


def _context_of_qlora(setting: Setting, shape: str, limit_bytes: int, tokens: int) -> Row:
    batch, _ = batches(shape, 1, tokens)
    step = qlora_step(setting, shape, batch)
    setting.free()
    with capped(setting.device, limit_bytes):
        return timing(in_turns(setting, {"step": step}, repetitions=1)["step"])
