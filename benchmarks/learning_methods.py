"""The methods of the learning benchmark, each with the forward passes that one of its steps takes.

    mezo         MeZO on the weights of all linear layers, central difference
    lozo         LOZO, rank 2, the other factor kept for 50 steps, central difference
    paper        `--preset paper`: AGZO's Algorithm 1
    zo-act       a basis fixed at the start, one shared direction, central difference, Adam on C
    default      `--preset default`, at its own learning rate unless one is given: layers that write to the residual
                 stream, guided at the head; a window's guide counts as a step: its plain pass as one forward, its way
                 back through norm and head as another
    forward      the same with forward differences
    exact        the same with exact derivatives (the tangent counts as the second forward)
    no-guide     the same without a guide: nothing but losses is seen
    all-layers   the same without a guide on all linear layers
    first-order  LoRA of the adapter's rank on all linear layers by back-propagation: peft, AdamW

All see the same examples in the same order and follow the same course of the learning rate, linear to zero, but for
`paper`, which is as published. MeZO, LOZO and first-order need dense weights: of a quantized base they get a float32
copy of what it stands for. The undo of a whole run is no part of this: its looks would take one forward in 25.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from baselines import FirstOrderLora, Lozo, Mezo

from agzo_edge.config import RunConfig, config_from
from agzo_edge.model.load import load_model
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.update import scheduled_rate
from agzo_edge.train.data import ExampleSet
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import Learner
from agzo_edge.train.loop import batches_of_step, probed_mu
from agzo_edge.train.objective import GOALS, loss_of
from agzo_edge.train.step import agzo_step

Base = Literal["float32", "8bit", "4bit"]
BASES: Mapping[str, Mapping[str, Any]] = {
    "float32": {"load_in_4bit": False},
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True},
}
ALL_LAYERS = {"target_modules": ("all-linear",), "guide": "none"}
ZO_ACT = ALL_LAYERS | {
    "rank": 4, "refresh_every": 0, "directions": "shared", "noise": "gaussian", "difference": "central",
    "normalize": False, "clip": 0.0, "optimizer": "adam",
}  # fmt: skip


GUIDE_FORWARDS = 2  # in each guided window, beside the steps' own


@dataclass(frozen=True)
class Method:
    """How a method is set up and swept."""

    preset: str  # which settings of agzo-edge it starts from
    settings: Mapping[str, Any]  # and what differs
    rates: Sequence[float]  # a decade apart; the sweep adds the half decades around the best
    forwards: int = 2  # in a step; a backward pass is counted as two forwards


OURS = (1e-2, 1e-1, 1.0, 10.0)
METHODS: Mapping[str, Method] = {
    "mezo": Method("default", ALL_LAYERS, (1e-5, 1e-4, 1e-3, 1e-2)),
    "lozo": Method("default", ALL_LAYERS, (1e-5, 1e-4, 1e-3, 1e-2)),
    "paper": Method("paper", {}, (1e-4, 1e-3, 1e-2, 1e-1)),
    "zo-act": Method("default", ZO_ACT, (1e-4, 1e-3, 1e-2, 1e-1)),
    "default": Method("default", {}, OURS),
    "forward": Method("default", {"difference": "forward"}, OURS),
    "exact": Method("default", {"difference": "exact"}, OURS),
    "no-guide": Method("default", {"guide": "none"}, OURS),
    "all-layers": Method("default", ALL_LAYERS, OURS),
    "first-order": Method("default", ALL_LAYERS, (1e-4, 1e-3, 1e-2, 1e-1), forwards=3),
}


@dataclass(frozen=True)
class Setup:
    """One run to make."""

    source: Path  # the model
    base: Base
    method: str
    rate: float | None  # none: the preset's own
    seed: int
    steps: int
    objective: str
    batch_size: int

    def forwards_after(self, steps: int) -> int:
        """The forward passes of 16 examples that so many steps of the method take, its guides' included."""
        config = self._config()
        every = config.refresh_every or steps
        guides = -(-steps // max(1, every)) if config.guide == "head" and self.is_ours else 0
        return METHODS[self.method].forwards * steps + GUIDE_FORWARDS * guides

    @property
    def is_ours(self) -> bool:
        """Whether agzo-edge's own step is taken."""
        return self.method not in ("mezo", "lozo", "first-order")

    @property
    def steps_within_forwards(self) -> int:
        """`steps`, or as many as take no more forward passes where guides take some as well."""
        forwards = METHODS[self.method].forwards * self.steps
        return next(steps for steps in range(self.steps, 0, -1) if self.forwards_after(steps) <= forwards)

    def config(self) -> RunConfig:
        """The run's settings; MeZO, LOZO and first-order take the data order, layers and schedule from them."""
        return self._config().model_copy(update={"max_steps": self.steps_within_forwards})

    def _config(self) -> RunConfig:
        method = METHODS[self.method]
        around = {
            "device": "cpu",
            "dtype": "float32",
            "objective": self.objective,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        rate = {} if self.rate is None else {"learning_rate": self.rate}
        return config_from(BASES[self.base], around, method.settings, rate, preset=method.preset)


def training(setup: Setup, model: EdgeModel, data: ExampleSet) -> Iterator[float]:
    """Train `model`'s branches or weights; each step's training loss. At every yield the model can be evaluated."""
    config = setup.config()
    if setup.method == "first-order":
        yield from _first_order(model, data, config)
    elif setup.method in ("mezo", "lozo"):
        yield from _perturbed_weights(Mezo if setup.method == "mezo" else Lozo, model, data, config)
    else:
        goal = goal_of(config)
        mu = config.mu if config.difference != "exact" else 1.0
        if mu == "auto":
            mu = probed_mu(model, data, config, goal=goal).mu
        learner = Learner(model.branches, config)
        for step in range(config.max_steps):
            batches = batches_of_step(model, data, step=step, config=config)
            yield agzo_step(model, batches, learner, step=step, mu=mu, config=config, goal=goal).loss


def loaded(setup: Setup) -> EdgeModel:
    """The model as the method needs it: as it is stored, or dense in float32 with the stored values."""
    config = setup.config()
    model = load_model(str(setup.source), config)
    if setup.is_ours or setup.base == "float32":
        return model
    dense = load_model(str(setup.source), config.model_copy(update={"load_in_4bit": False, "load_in_8bit": False}))
    for name, layer in dense.layers.items():
        layer.base.dense().copy_(model.layers[name].base.dense())
    return dense


def _rate(config: RunConfig, step: int) -> float:
    return scheduled_rate(
        step,
        peak=config.learning_rate,
        schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        max_steps=config.max_steps,
    )


def _perturbed_weights(method: type[Mezo], model: EdgeModel, data: ExampleSet, config: RunConfig) -> Iterator[float]:
    """MeZO or LOZO on the dense weights of the layers that agzo-edge would adapt."""
    losses: list[float] = []

    def loss() -> float:
        losses.append(float(batch.weights @ loss_of(model, batch, goal=GOALS[config.objective])[0]))
        return losses[-1]

    weights = [layer.base.dense() for layer in model.layers.values()]
    zeroth_order = method(weights, loss)
    for step in range(config.max_steps):
        (batch,) = batches_of_step(model, data, step=step, config=config)
        with torch.no_grad():
            zeroth_order.step(step + 10**6 * config.seed, learning_rate=_rate(config, step))
        yield sum(losses[-2:]) / 2


def _first_order(model: EdgeModel, data: ExampleSet, config: RunConfig) -> Iterator[float]:
    """peft's LoRA, trained by AdamW."""
    lora = FirstOrderLora(model, rank=config.adapter_rank, learning_rate=config.learning_rate, seed=config.seed)
    for step in range(config.max_steps):
        (batch,) = batches_of_step(model, data, step=step, config=config)
        loss = lora.step(batch, objective=config.objective, learning_rate=_rate(config, step))
        lora.show()
        yield loss
