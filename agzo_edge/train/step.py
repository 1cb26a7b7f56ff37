"""One AGZO step, top to bottom."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agzo_edge.config import RunConfig
from agzo_edge.errors import NonFiniteLossError
from agzo_edge.model.branch import Branch
from agzo_edge.model.device import sent
from agzo_edge.model.passes import Perturbation, Refresh
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.estimate import projected_gradients
from agzo_edge.numerics.noise import Noise
from agzo_edge.train.data import Batch
from agzo_edge.train.guide import find_guides
from agzo_edge.train.learner import Learner, Measurement
from agzo_edge.train.objective import Goal, loss_of, run_layers


@dataclass(frozen=True)
class StepRecord:
    """What one step did: enough, with the bases, to do it again without the model."""

    step: int
    loss: float  # mean over the examples, weighted as the step weighs them, in nats
    learning_rate: float
    mu: float
    projected: tuple[float, ...]  # g, one for each direction
    weights: tuple[float, ...]  # w, likewise
    label_tokens: int
    left_out: float | None = None  # energy lost to compression, in a step that opened a window
    watched: tuple[float, ...] | None = None  # losses of the watched examples, where they were looked at before it
    went_back_to: int | None = None  # the steps of the best state so far, where the run went back to it before this one
    ended_at: int | None = None  # likewise, where it went back after this one, its last


def agzo_step(
    model: EdgeModel,
    batches: Sequence[Batch],
    learner: Learner,
    *,
    step: int,
    mu: float,
    config: RunConfig,
    goal: Goal,
) -> StepRecord:
    """Learn from one batch, given as micro-batches, with forward passes only.

    Raises NonFiniteLossError, naming the rows, before anything is changed by this step.
    Source: AGZO, arXiv 2601.17261, Algorithm 1; a direction for each example after GRZO, arXiv 2606.02857.
    """
    left_out = None
    refresh = Refresh.NONE
    with learner.undone_on_error():
        if learner.window_starts(step):
            left_out = learner.close_window(step)
            refresh = begin_window(model, batches, config, goal=goal)
        measured, loss = measure(model, batches, step=step, mu=mu, config=config, goal=goal, refresh=refresh)
        if left_out is not None:
            learner.open_window()
        # A reward has no zero to be a share of.
        longest = math.inf if config.objective == "reward" else learner.longest_rate(measured, loss=loss)
        learning_rate = learner.learning_rate(step, longest=longest)
        learner.apply(step, measured, learning_rate=learning_rate)
    return StepRecord(
        step=step,
        loss=loss,
        learning_rate=learning_rate,
        mu=mu,
        projected=tuple(measured.projected.tolist()),
        weights=tuple(measured.weights.tolist()),
        label_tokens=sum(int(batch.is_label.sum()) for batch in batches),
        left_out=left_out,
    )


def is_one_pass(batches: Sequence[Batch], config: RunConfig) -> bool:
    """Whether every layer meets all inputs of the step in one call."""
    writes = config.objective == "reward"  # each token is a pass of its own
    return len(batches) == 1 and config.fuse_signs and config.mlp_chunk_tokens is None and not writes


def measure(
    model: EdgeModel,
    batches: Sequence[Batch],
    *,
    step: int,
    mu: float,
    config: RunConfig,
    goal: Goal,
    refresh: Refresh = Refresh.NONE,
) -> tuple[Measurement, float]:
    """The projected gradients of a step's noise and the batch's loss, by forward passes; nothing is learned.

    Raises NonFiniteLossError, naming the rows.
    """
    goal = goal.at(step)
    parts = [_losses(model, batch, goal, step=step, mu=mu, config=config, refresh=refresh) for batch in batches]
    losses = torch.cat(parts, dim=1).cpu()  # the one moment of a step that waits for the device
    _require_finite(losses, batches, step=step, mu=mu)
    return _measured(losses, batches, mu=mu, config=config)


def _losses(
    model: EdgeModel, batch: Batch, goal: Goal, *, step: int, mu: float, config: RunConfig, refresh: Refresh
) -> Tensor:  # (2, examples) float32
    """The losses of one micro-batch under noise, both signs in one pass or in two; or value and derivative."""
    on_device = batch.to(model.device)
    steps = {"central": (mu, -mu), "forward": (mu, 0.0), "exact": (1.0,)}[config.difference]
    shared = config.directions == "shared"
    perturbation = Perturbation(
        noise_of=_noise_of(
            model,
            n_examples=1 if shared else batch.answer.shape[0],
            first_example=0 if shared else batch.first_example,
            step=step,
            config=config,
        ),
        example=torch.zeros_like(on_device.example) if shared else on_device.example,
        steps=steps,
        exact=config.difference == "exact",
    )
    passes = [perturbation] if config.fuse_signs else [replace(perturbation, steps=(each,)) for each in steps]
    return torch.cat([loss_of(model, on_device, goal=goal, perturbation=each, refresh=refresh) for each in passes])


def _noise_of(
    model: EdgeModel, *, n_examples: int, first_example: int, step: int, config: RunConfig
) -> Callable[[Branch], Noise]:
    """The noise of a micro-batch as a function of the branch; the few numbers along guides go to the device at once."""

    def drawn(branch: Branch) -> Noise:
        return branch.noise(config.noise, n_examples, seed=config.seed, step=step, first_example=first_example)

    led = {branch.index: drawn(branch) for branch in model.branches if branch.guide is not None}
    if led:
        entries = sent(torch.stack([noise.stored for noise in led.values()]), model.device)
        led = {index: replace(led[index], stored=stored) for index, stored in zip(led, entries, strict=True)}
    return lambda branch: drawn(branch) if branch.guide is None else led[branch.index]


def _require_finite(losses: Tensor, batches: Sequence[Batch], *, step: int, mu: float) -> None:
    """Raise NonFiniteLossError naming the rows whose loss is NaN or infinite, if there are any."""
    places = [place for batch in batches for place in batch.places]
    bad = [place for place, ok in zip(places, losses.isfinite().all(0).tolist(), strict=True) if not ok]
    if bad:
        raise NonFiniteLossError(
            f"step {step + 1}: the loss of {', '.join(bad[:5])} is not finite. Nothing was learned from this step; "
            f"look at these rows, or begin a new run with a smaller --mu (now {mu:g}) or, where that of the run is "
            f"narrower, --dtype float32; --adapter CHECKPOINT goes on from what this one has learned"
        )


def _measured(losses: Tensor, batches: Sequence[Batch], *, mu: float, config: RunConfig) -> tuple[Measurement, float]:
    """The projected gradient of each direction and its weight, and the batch's loss."""
    weights = torch.cat([batch.weights for batch in batches])
    at_zero = losses.mean(0) if config.difference == "central" else losses[1 if config.difference == "forward" else 0]
    projected = projected_gradients(losses, mu=mu, difference=config.difference)
    loss = float(weights @ at_zero)
    if config.directions == "shared":
        projected, weights = (weights @ projected).reshape(1), torch.ones(1)
    return Measurement(projected, weights), loss


def begin_window(model: EdgeModel, batches: Sequence[Batch], config: RunConfig, *, goal: Goal) -> Refresh:
    """What is left to the step's own pass of finding the window's bases, scales and guides.

    Bases may wait for it where it sees the whole batch, no part of which may shape a basis alone. Guides may not: the
    noise goes along them. They take a plain pass before it, in which the bases are then found as well.
    """
    in_one = is_one_pass(batches, config)
    if in_one and config.guide == "none":
        return Refresh.IN_PASS
    find_window(model, batches, config, goal=goal, refresh=Refresh.IN_PASS if in_one else Refresh.NONE)
    return Refresh.NONE


def find_window(
    model: EdgeModel,
    batches: Sequence[Batch],
    config: RunConfig,
    *,
    goal: Goal,
    refresh: Refresh = Refresh.NONE,
) -> None:
    """Find bases, scales and guides in plain passes; with `refresh` IN_PASS the bases in that of the guides."""
    old_bases = {group.index: group.basis for group in model.groups}
    if refresh is Refresh.NONE:
        find_bases(model, batches, config)
    if config.guide != "none":
        find_guides(model, batches, goal, memory=config.guide_memory, old_bases=old_bases, refresh=refresh)


def find_bases(model: EdgeModel, batches: Sequence[Batch], config: RunConfig) -> None:
    """Find the bases and scales from several micro-batches: plain passes, one for each power iteration.

    The same subspace iteration as inside a single pass, its products summed over the micro-batches. With guides the
    tokens that predict a label shape them: of those the guess at a gradient is made (docs/decisions/0036).
    """
    model.context.forget()
    rounds = [Refresh.ACCUMULATE] * config.power_iterations + [Refresh.MEASURE] * config.relative
    for refresh in rounds:
        for batch in batches:
            on_device = batch.to(model.device)
            mask = on_device.attention_mask.bool() if config.guide == "none" else on_device.is_predicting
            run_layers(model, on_device, mask=mask, refresh=refresh)
        model.context.finish_iteration(model.groups)
        model.context.finish_scales()
