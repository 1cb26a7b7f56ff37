"""What a run tells whoever watches it, in the order it happens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agzo_edge.budget.memory import MemoryPlan
from agzo_edge.budget.plan import Rung
from agzo_edge.config import RunConfig
from agzo_edge.train.data import DataReport, Sample
from agzo_edge.train.evaluate import Metrics
from agzo_edge.train.loop import TimedStep
from agzo_edge.train.probe import MuProbe
from agzo_edge.train.template import Asking


@dataclass(frozen=True)
class Planned:
    """The memory plan fits; nothing is loaded yet."""

    config: RunConfig  # as fitted: micro_batch_size may be smaller than asked
    plan: MemoryPlan
    machine: str
    changes: tuple[str, ...]  # what was changed so that it fits
    rungs: tuple[Rung, ...]  # the ways to take a step in ever less memory, this one first
    notes: tuple[str, ...] = ()  # what a person should know of the device


@dataclass(frozen=True)
class DataReady:
    """The data is read and sound."""

    train: DataReport
    held_out: DataReport | None
    sample: Sample = ()  # the first training example as text
    asking: Asking | None = None  # how its rows ask the model, and what one asks
    passes: float = 0.0  # through the training rows, in all steps


@dataclass(frozen=True)
class ModelReady:
    """The model is loaded and its branches attached."""

    source: str
    n_layers: int  # with a branch
    device: str
    dtype: str
    quantization: str
    first_step: int  # 0, or where a resumed run goes on


@dataclass(frozen=True)
class MuChosen:
    """The perturbation size was found by probing the first batch."""

    probe: MuProbe


@dataclass(frozen=True)
class Moved:
    """The run works in smaller pieces from here on, or in larger ones again, because memory got scarce or came back."""

    step: int  # steps done before it
    what: str  # and why


@dataclass(frozen=True)
class WentBack:
    """The run had done harm, or at its end gained nothing: it is in its best state again, with a smaller rate."""

    step: int  # steps done before it
    to_step: int  # steps of which the best state is the result
    learning_rate: float  # of the next step; 0 when there is none


@dataclass(frozen=True)
class Evaluated:
    """Held-out examples were scored after `step` steps."""

    step: int
    metrics: Metrics


@dataclass(frozen=True)
class Stepped:
    """A step is done and in the journal."""

    timed: TimedStep


@dataclass(frozen=True)
class Saved:
    """The adapter of `step` steps is on the disk."""

    step: int
    directory: Path


@dataclass(frozen=True)
class Finished:
    """The run is over; everything is on the disk."""

    run: "Run"


@dataclass(frozen=True)
class Run:
    """What a run leaves behind."""

    adapter: Path  # the output directory: adapter, journal, report
    before: Metrics | None
    after: Metrics | None
    report: dict[str, Any]  # as in report.json


Event = Planned | DataReady | ModelReady | MuChosen | Moved | WentBack | Evaluated | Stepped | Saved | Finished
