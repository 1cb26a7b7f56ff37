"""What a run cost and gave, read from its directory."""

from pathlib import Path
from typing import Any

from agzo_edge.errors import AdapterError
from agzo_edge.record.strict_json import strict_object
from agzo_edge.rundir import REPORT_NAME, read_run


def run_report(directory: Path) -> dict[str, Any]:
    """report.json of a finished run, the journal's account of an interrupted one. Raises AdapterError for neither."""
    path = directory / REPORT_NAME
    if not path.is_file():
        return _account_so_far(directory)
    try:
        report = strict_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from None
    if not _is_whole(report):
        raise AdapterError(f"{path}: is no report of a run")
    return report


def _is_whole(report: dict[str, Any]) -> bool:
    """Whether it has what a run's report has, as far as anybody looks into it."""
    try:
        losses = [told["loss"] for step, told in report["evaluations"].items() if int(step) >= 0]
        texts = [sample[part] for sample in report["samples"] for part in ("prompt", "before", "after")]
    except (KeyError, ValueError, TypeError, AttributeError):
        return False
    numbers = all(loss is None or isinstance(loss, int | float) for loss in losses)
    return report.get("finished") is True and numbers and all(isinstance(text, str) for text in texts)


def _account_so_far(directory: Path) -> dict[str, Any]:
    journal = read_run(directory)
    return {
        "model": journal.header["config"]["model"],
        "finished": False,
        "steps": len(journal.records),
        "max_steps": journal.header["config"]["max_steps"],
        "wall_s": round(sum(record["wall_s"] for record in journal.records), 3),
        "tokens": sum(record["tokens"] for record in journal.records),
        "measured_peak_bytes": max((record["peak_bytes"] for record in journal.records), default=None),
        "last_loss": journal.records[-1]["loss"] if journal.records else None,
    }
