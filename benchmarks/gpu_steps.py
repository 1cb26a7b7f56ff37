"""A step's time and peak memory for models of real sizes, beside what people would use instead."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_baselines import dense_model, mezo_step, paper_step, qlora_step
from gpu_measure import Row, Rows, Run, attempted, in_turns, peak_of, ratio, timing
from gpu_models import Setting, facts_of_shape, random_model, shapes
from step_cost import random_batch

from agzo_edge.budget.detect import machine_profile
from agzo_edge.budget.plan import memory_plan
from agzo_edge.config import RunConfig
from agzo_edge.train.data import Batch
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import Learner
from agzo_edge.train.objective import GOALS, loss_of
from agzo_edge.train.step import agzo_step

MU = 1e-2
MODELS = ("qwen3-0.6b", "llama-3.1-8b", "qwen3-4b", "qwen3-1.7b", "qwen3-14b", "qwen3-8b")  # a lease may be short
# B examples x tokens: a forward of both signs has twice as many rows. All in all 256 to 8,192 tokens in a forward.
BATCHES = ((1, 128), (1, 512), (1, 2048), (4, 1024))
REPETITIONS = 5


@dataclass
class Subject:
    """A model of ours in the middle of a window, with a fresh adapter, and what it can do."""

    model: Any
    learner: Learner
    config: RunConfig

    def __post_init__(self) -> None:
        self._nothing = [branch.folded for branch in self.model.branches]

    def step(self, batch: Batch, step: int) -> None:
        """One AGZO step, no window folded before it."""
        self._forget_folded()
        agzo_step(self.model, [batch], self.learner, step=step, mu=MU, config=self.config, goal=goal_of(self.config))

    def runs(self, batch: Batch, twice: Batch) -> dict[str, Run]:
        """The plain forward of 2B rows without any branch, a step, and a step that finds new bases."""
        return {
            "plain forward of 2B rows": lambda: self.plain(twice),
            "step": lambda: self.step(batch, 1),
            "step with refresh": lambda: self.step(batch, self.config.refresh_every),
        }

    def plain(self, batch: Batch) -> None:
        """The forward through the same layers, all branches empty; then the window under way is back."""
        self._forget_folded()
        done = [branch.steps_in_window for branch in self.model.branches]
        for branch in self.model.branches:
            branch.steps_in_window = 0
        loss_of(self.model, batch.to(self.model.device), goal=GOALS["lm"]).cpu()
        for branch, steps in zip(self.model.branches, done, strict=True):
            branch.steps_in_window = steps

    def _forget_folded(self) -> None:
        for branch, nothing in zip(self.model.branches, self._nothing, strict=True):
            branch.folded = nothing


def subject_of(setting: Setting, shape: str, **settings: Any) -> Subject:
    """The shape, quantized to 4 bit, its branches untouched."""
    config = setting.config(**settings)
    model = random_model(shape, config)
    return Subject(model, Learner(model.branches, config), config)


def batches(shape: str, n: int, tokens: int) -> tuple[Batch, Batch]:
    """`n` rows on the host, and twice as many."""
    vocab = shapes()[shape].vocab_size
    return random_batch(n, tokens=tokens, vocab=vocab), random_batch(2 * n, tokens=tokens, vocab=vocab)


def steps(setting: Setting) -> Rows:
    """Ours, and the baselines one after another, for every model; the methods' models are not there together.

    Ratios are over the plain forward of 2B rows through the 4-bit layers in the same rounds. MeZO, the paper's AGZO and
    QLoRA take turns with nothing: they have the card for themselves, and `over_plain` divides by the median.
    """
    sizes = ((2, 16),) if setting.small else BATCHES
    for shape in ("tiny",) if setting.small else MODELS:
        plain_s: dict[tuple[int, int], float] = {}
        yield from _ours(setting, shape, sizes, plain_s)
        yield from _dense(setting, shape, sizes, plain_s)
        for size in sizes:
            yield _qlora(setting, shape, size, plain_s)


def _about(shape: str, size: tuple[int, int]) -> Row:
    return {"model": shape, "examples": size[0], "tokens_of_each": size[1]}


def _ours(setting: Setting, shape: str, sizes: Any, plain_s: dict[tuple[int, int], float]) -> Rows:
    """Plain forward and our steps: times, peak, and the plan for it."""
    subject: list[Subject] = []  # made inside `attempted`: it may not fit

    def measured(size: tuple[int, int]) -> Row:
        subject[:] = subject or [subject_of(setting, shape)]
        batch, twice = batches(shape, *size)
        runs = subject[0].runs(batch, twice)
        subject[0].step(batch, 0)
        times = in_turns(setting, runs, repetitions=2 if setting.small else REPETITIONS)
        peak = peak_of(setting, runs["step with refresh"])
        return {"times": times, "peak_bytes": peak, "planned_bytes": planned_bytes(setting, shape, size)}

    for size in sizes:
        found = attempted(setting, {}, lambda size=size: measured(size))
        if "not_run" in found:
            yield _about(shape, size) | {"method": "ours"} | found
            continue
        times = found["times"]
        plain_s[size] = statistics.median(times["plain forward of 2B rows"])
        for name, of_run in times.items():
            row = timing(of_run) | {"over_plain": ratio(of_run, times["plain forward of 2B rows"])}
            memory = {} if name.startswith("plain") else {key: found[key] for key in ("peak_bytes", "planned_bytes")}
            yield _about(shape, size) | {"method": name} | row | memory


def planned_bytes(setting: Setting, shape: str, size: tuple[int, int], **settings: Any) -> int:
    """What the plan says of a run with batches of this size."""
    config = setting.config(batch_size=size[0], max_seq_length=size[1], **settings)
    return memory_plan(facts_of_shape(shape), config, machine_profile("auto")).device_bytes


def _dense(setting: Setting, shape: str, sizes: Any, plain_s: dict[tuple[int, int], float]) -> Rows:
    """MeZO and the paper's AGZO, both in place on dense weights."""
    model: list[Any] = []

    def measured(size: tuple[int, int], step_of: Callable[..., Run]) -> Row:
        model[:] = model or [dense_model(setting, shape)]
        return _alone(setting, step_of(model[0], batches(shape, *size)[0]), plain_s.get(size))

    for size in sizes:
        for name, step_of in (("mezo, dense", mezo_step), ("paper's agzo in place, dense", paper_step)):
            about = _about(shape, size) | {"method": name}
            yield attempted(setting, about, lambda size=size, step_of=step_of: measured(size, step_of))


def _qlora(setting: Setting, shape: str, size: tuple[int, int], plain_s: dict[tuple[int, int], float]) -> Row:
    """QLoRA, made anew for each size so that a failure leaves nothing behind."""

    def measured() -> Row:
        return _alone(setting, qlora_step(setting, shape, batches(shape, *size)[0]), plain_s.get(size))

    return attempted(setting, _about(shape, size) | {"method": "qlora"}, measured)


def _alone(setting: Setting, step: Run, plain_s: float | None) -> Row:
    """Time and peak of a method that has the device for itself."""
    times = in_turns(setting, {"step": step}, repetitions=1 if setting.small else 3)["step"]
    over = {"over_plain": statistics.median(times) / plain_s} if plain_s else {}
    return timing(times) | over | {"peak_bytes": peak_of(setting, step)}
