"""What `--json` writes: events and results as plain objects, strict JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agzo_edge.events import Event
    from agzo_edge.train.evaluate import Metrics
    from agzo_edge.train.fidelity import Fidelity
    from agzo_edge.train.loop import TimedStep


def json_line(value: Any) -> str:
    """`value` on one line of ASCII, as any terminal writes it; a NaN becomes null, a path its text."""
    return json.dumps(_plain(value), allow_nan=False)


def error_object(error: BaseException, *, exit_code: int) -> dict[str, Any]:
    """What stands on stdout for a failure."""
    message = str(error) or type(error).__name__
    return {"error": {"kind": type(error).__name__, "message": message, "exit_code": exit_code}}


def event_object(event: "Event") -> dict[str, Any]:
    """`event` under its name, in the order of the run: planned ... finished."""
    from agzo_edge import events

    match event:
        case events.Planned(config=config, plan=plan, machine=machine, changes=changes, notes=notes):
            settings = config.model_dump(mode="json")
            fields = {"machine": machine, "changes": changes, "notes": notes, "plan": plan.to_dict()}
            return {"event": "planned"} | fields | {"config": settings}
        case events.DataReady():
            return {"event": "data"} | asdict(event)
        case events.ModelReady():
            return {"event": "model"} | asdict(event)
        case events.MuChosen(probe=probe):
            return {"event": "mu"} | asdict(probe)
        case events.Moved():
            return {"event": "moved"} | asdict(event)
        case events.WentBack():
            return {"event": "went_back"} | asdict(event)
        case events.Evaluated(step=step, metrics=metrics):
            return {"event": "evaluated", "step": step} | metrics_object(metrics)
        case events.Stepped(timed=timed):
            return {"event": "step"} | _step_object(timed)
        case events.Saved():
            return {"event": "saved"} | asdict(event)
        case events.Finished(run=run):
            before, after = (metrics_object(m) if m else None for m in (run.before, run.after))
            return {
                "event": "finished",
                "adapter": run.adapter,
                "before": before,
                "after": after,
                "report": run.report,
            }


def metrics_object(metrics: "Metrics") -> dict[str, Any]:
    """The result of an evaluation."""
    return asdict(metrics) | {"perplexity": metrics.perplexity}


def fidelity_object(seen: "Fidelity") -> dict[str, Any]:
    """What `doctor --numerics` saw."""
    return asdict(seen) | {"error_of_auto": seen.error_of_auto, "best": seen.best, "advice": seen.advice}


def _step_object(timed: "TimedStep") -> dict[str, Any]:
    """A step without its projected gradients, which the journal keeps."""
    record = timed.record
    return {
        "step": record.step + 1,  # steps done, as in an evaluation
        "loss": record.loss,
        "learning_rate": record.learning_rate,
        "mu": record.mu,
        "label_tokens": record.label_tokens,
        "tokens": timed.tokens,
        "wall_s": timed.wall_s,
        "peak_bytes": timed.peak_bytes,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
