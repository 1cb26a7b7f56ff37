"""A run's numbers for TensorBoard, in the run's own directory."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from agzo_edge.errors import ConfigError
from agzo_edge.events import Evaluated, Event, Stepped


def require_tensorboard() -> None:
    """Raise ConfigError when tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ConfigError("report_to is tensorboard, which is not installed: pip install tensorboard") from None


def with_tensorboard(events: Generator[Event], run_dir: Path) -> Generator[Event]:
    """The same events, each number among them also written to `run_dir`/runs."""
    from torch.utils.tensorboard import SummaryWriter

    writer = None
    waiting: list[tuple[int, dict[str, float]]] = []
    try:
        with closing(events):
            for event in events:
                if isinstance(event, Evaluated | Stepped):
                    waiting.append(_scalars(event))
                if writer is None and isinstance(event, Stepped):  # the directory is the run's from here on
                    writer = SummaryWriter(str(run_dir / "runs"))
                while writer is not None and waiting:
                    step, scalars = waiting.pop(0)
                    for name, value in scalars.items():
                        writer.add_scalar(name, value, step)
                yield event
    finally:
        if writer is not None:
            writer.close()


def _scalars(event: Evaluated | Stepped) -> tuple[int, dict[str, float]]:
    """The step and the numbers of an event, by name."""
    if isinstance(event, Evaluated):
        accuracy = {} if event.metrics.accuracy is None else {"held_out/accuracy": event.metrics.accuracy}
        return event.step, {"held_out/loss": event.metrics.loss, **accuracy}
    record = event.timed.record
    return record.step + 1, {
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/tokens_per_s": event.timed.tokens / event.timed.wall_s,
        "memory/peak_bytes": float(event.timed.peak_bytes),
    }
