"""What people see of a run that is over: what came of it, what it cost, and how to use it."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from agzo_edge.cli.course import Course
from agzo_edge.cli.options import as_flags, panel_of
from agzo_edge.cli.screen import curve, duration
from agzo_edge.config import RunConfig
from agzo_edge.demo import demo_settings
from agzo_edge.units import format_bytes

if TYPE_CHECKING:
    from agzo_edge.events import Run
    from agzo_edge.train.evaluate import Metrics

REWARDS_ALIKE = (
    "each prompt's two answers had the same reward. Try --temperature, more --max-new-tokens, a larger --mu or a finer "
    "reward"
)


def before_after(before: "Metrics", after: "Metrics", course: Course, losses: Sequence[float]) -> list[Text]:
    """The held-out metrics from before to after, with the curve of the losses, or rewards, in between."""
    share = after.loss / before.loss - 1 if before.loss > 0 else math.nan
    change = f"{share:+.0%}" if abs(share) >= 0.005 else ""
    style = "bold green" if after.loss < before.loss else "bold yellow"
    line = curve([course.told(loss) for loss in losses])
    first, last = (course.told(metrics.loss) for metrics in (before, after))
    result = Text.assemble(f"{first:.4f} ", (line, "cyan"), " ", (f"{last:.4f}", style), f"  {change}".rstrip())
    lines = [_result(f"held-out {course.measure}", result)]
    if before.accuracy is not None and after.accuracy is not None:
        lines.append(_result("accuracy", f"{before.accuracy:.1%} -> {after.accuracy:.1%}"))
    return lines


def best_adapter(run: "Run", metric: str) -> Path | None:
    """Where the adapter is that did best on the held-out rows, unless the last is as good."""
    from agzo_edge.rundir import BEST_NAME  # loads torch

    found, best = run.report.get("evaluations") or {}, run.report.get("best_step")
    if not best or found[str(best)][metric] in (None, found[max(found, key=int)][metric]):
        return None
    path = run.adapter / BEST_NAME
    return path if path.is_dir() else None  # somebody may have taken it away


def ending_lines(run: "Run", course: Course) -> list[Text]:
    """What a person should know of how a run ended: too early, not at its best, or without having learned."""
    assert course.planned is not None
    config, steps = course.planned.config, run.report["steps"]
    metric = config.metric_for_best_model
    lines = []
    if steps < config.max_steps:
        why = f"no better in {config.early_stopping_patience} evaluations"
        lines.append(_result("stopped early", f"after step {steps} of {config.max_steps}: {why}"))
    if path := best_adapter(run, metric):
        best = run.report["best_step"]
        value = run.report["evaluations"][str(best)][metric]
        told = f"{course.measure} {course.told(value):.4f}" if metric == "loss" else f"{metric} {value:.4f}"
        lines.append(_result("best", f"{told} after step {best}, in {path}"))
    if silent := run.report.get("steps_without_signal"):
        alike = REWARDS_ALIKE if config.objective == "reward" else "no example's loss had changed"
        lines.append(_result("note", Text(f"nothing was learned in {silent} of {steps} steps: {alike}", "yellow")))
    return lines


def cost_lines(run: "Run") -> list[Text]:
    """What the run took, predicted and measured."""
    report = run.report
    lines = []
    measured, predicted, limit = (
        report.get(name) for name in ("measured_peak_bytes", "predicted_peak_bytes", "limit_bytes")
    )
    if measured and predicted:
        share = f"{measured / predicted:.0%} of the {format_bytes(predicted)} predicted"
        allowed = f", {format_bytes(limit)} allowed" if limit else ""
        lines.append(_result("memory", f"{format_bytes(measured)} at the peak, {share}{allowed}"))
        lines += [_result("", Text(_parts_text(report["memory"]), "dim"))] if report.get("memory") else []
    if report.get("tokens_per_s"):
        pace = f"{report['steps']:,} steps, {report['tokens_per_s']:,.0f} tokens/s"
        lines.append(_result("time", f"{duration(report['wall_s'])} for {pace}"))
    return [*lines, _result("adapter", str(run.adapter))]


def _parts_text(parts: Mapping[str, Mapping[str, int]]) -> str:
    """Each part of the memory as measured, and in brackets as predicted."""
    amounts = (
        f"{name} {format_bytes(part['measured_bytes'])} ({format_bytes(part['predicted_bytes'])})"
        for name, part in parts.items()
    )
    return ", ".join(amounts)


def _result(name: str, text: str | Text) -> Text:
    return Text.assemble((f"{name:16}", "bold"), text)


def generate_command(config: RunConfig, adapter: str, prompt: str) -> str:
    """The line that writes text with what this run has learned; a shell reads it as it stands."""
    differing = {
        name: getattr(config, name)
        for name, field in RunConfig.model_fields.items()
        if panel_of(name) == "Model" and name != "adapter" and getattr(config, name) != field.default
    }
    if config.model == demo_settings()["model"]:
        del differing["model"]  # what no --model means
    words = ["agzo-edge", "generate", *as_flags(differing), "--adapter", adapter, "--prompt", prompt]
    return shlex.join(words)
