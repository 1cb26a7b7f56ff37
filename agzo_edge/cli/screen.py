"""What people see of plans, profiles, metrics and reports: tables and lines. Nothing here prints."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from agzo_edge.units import format_bytes

if TYPE_CHECKING:
    from agzo_edge.budget.memory import MemoryPlan
    from agzo_edge.budget.profile import Profile
    from agzo_edge.train.evaluate import Metrics

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_POINTS = 40
LEAST_CHANGE = 1e-3  # of a curve's largest value; what varies less is drawn as a line
_ON_DISK = {"disk": "the disk", "cache": "the cache folder's disk"}  # of a plan's places
COLUMNS_WITH_FORMULAS = 72  # below it every formula would fold into a dozen lines


def curve(found: Sequence[float | None]) -> str:
    """The finite values as a row of blocks, the least the lowest; at most CURVE_POINTS of them, evenly chosen."""
    values = [value for value in found if value is not None and math.isfinite(value)]
    if len(values) > CURVE_POINTS:
        last = len(values) - 1
        values = [values[round(i * last / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]
    if not values:
        return ""
    low, spread = min(values), max(values) - min(values)
    spread = spread if spread > LEAST_CHANGE * max(map(abs, values)) else math.inf  # rounding is no change
    return "".join(BLOCKS[round((v - low) / spread * (len(BLOCKS) - 1))] for v in values)


def duration(seconds: float) -> str:
    """Time for a person: "8 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plan_table(plan: "MemoryPlan", *, columns: int) -> Table:
    """Every component of the plan, the places one after another, each with its sum; formulas where there is room."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("component", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True)
    if wide := columns >= COLUMNS_WITH_FORMULAS:
        table.add_column("computed from", style="dim")
    for where in dict.fromkeys(component.where for component in plan.components):
        for component in plan.components:
            if component.where == where and component.n_bytes > 0:
                formula = [Text(component.formula)] if wide else []
                table.add_row(component.name, format_bytes(component.n_bytes), where, *formula)
        table.add_row("in all", format_bytes(plan.bytes_on(where)), where, style="bold", end_section=True)
    return table


def comparison(plan: "MemoryPlan") -> Text:
    """What QLoRA would need for the same job, and which of the two to take."""
    need = plan.qlora
    if need is None:
        return Text("")
    whole, single = format_bytes(need.total_bytes), format_bytes(need.smallest_bytes)
    advice = "more than is allowed"
    if need.smallest_bytes <= plan.limit_bytes:
        advice = "that fits, and in as many steps it reaches a lower loss: take it, unless the limit must be held"
    sizes = f"at least {whole} with the same rows in a pass, {single} with one example (by formula, not measured): "
    return Text.assemble(("QLoRA: ", "bold"), sizes, advice)


def verdict(plan: "MemoryPlan") -> Text:
    """Whether the plan fits, and by how much; then what would make it smaller."""
    need, limit = format_bytes(plan.device_bytes), format_bytes(plan.limit_bytes)
    text = f"{need} at the peak; profile '{plan.profile_name}' allows {limit}"
    if plan.fits:
        return Text.assemble(("fits: ", "bold green"), f"{text}, {format_bytes(plan.headroom_bytes)} to spare")
    over = f"{format_bytes(-plan.headroom_bytes)} too much"
    if plan.headroom_bytes >= 0:
        where, need_bytes, limit_bytes = next(place for place in plan.limits if place[1] > place[2])
        text = f"{format_bytes(need_bytes)} of {_ON_DISK.get(where, 'host memory')}"
        over = f"{format_bytes(limit_bytes)} may be used"
    changes = [
        f"\n  {change.flags}  saves {format_bytes(change.saved_bytes)}" + (", enough alone" if change.fits else "")
        for change in plan.changes
    ]
    advice = "\nwhat saves memory:" + "".join(changes) if changes else "\na smaller model is needed"
    if plan.limit_bytes < plan.least_bytes:
        least = format_bytes(plan.least_bytes)
        advice = f"\nthe libraries and the largest layer's weights alone take {least}: a higher limit is needed"
    if plan.in_pieces is None:
        return Text.assemble(("does not fit: ", "bold red"), f"{text}, {over}{advice}")
    taken = f"\n`train` takes it with {plan.in_pieces.how}: {format_bytes(plan.in_pieces.device_bytes)}"
    return Text.assemble(("fits in pieces: ", "bold yellow"), f"{text}, {over}{taken}{advice}")


def metrics_text(metrics: "Metrics") -> str:
    """The result of an evaluation on one line."""
    parts = [f"loss {metrics.loss:.4f}"] if metrics.reward is None else []  # which is the loss, but for its sign
    parts += [] if metrics.accuracy is None else [f"accuracy {metrics.accuracy:.1%}"]
    parts += [] if metrics.macro_f1 is None else [f"macro-F1 {metrics.macro_f1:.3f}"]
    parts += [] if metrics.reward is None else [f"reward {metrics.reward:.4f}"]
    parts += [f"perplexity {metrics.perplexity:,.4g}"] if metrics.is_likelihood else []
    return ", ".join([*parts, f"{metrics.examples:,} examples"])


def metrics_table(metrics: "Metrics") -> Table:
    """Every metric of an evaluation with its interval."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("metric", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    told = {name: getattr(metrics, name) for name in ("loss", "accuracy", "macro_f1", "reward")}
    for name, value in told.items():
        if value is not None:
            interval = metrics.intervals.get(name)
            span = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
            table.add_row(name.replace("_", "-"), f"{value:.4f}", span)
    if metrics.is_likelihood:
        table.add_row("perplexity", f"{metrics.perplexity:,.4g}", "")
    table.add_row("examples", f"{metrics.examples:,}", "")
    return table


def samples_table(samples: Sequence[Mapping[str, str]]) -> Table:
    """The same prompts answered before and after, side by side."""
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True, padding=(0, 2, 1, 0))
    table.add_column("prompt", ratio=2, style="dim")
    table.add_column("before", ratio=3)
    table.add_column("after", ratio=3, style="green")
    for sample in samples:
        table.add_row(*(Text(sample[name]) for name in ("prompt", "before", "after")))
    return table


def profiles_table(profiles: Sequence["Profile"]) -> Table:
    """The shipped profiles: memory, speed, and whether they compute in bfloat16."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("profile", no_wrap=True)
    for name in ("memory", "usable", "bandwidth"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bf16")
    table.add_column("machine", style="dim")
    for profile in profiles:
        speed = profile.memory_bandwidth_gb_s
        amounts = format_bytes(profile.memory), format_bytes(profile.budget_bytes)
        bandwidth = "-" if speed is None else f"{speed:,.0f} GB/s"
        table.add_row(profile.name, *amounts, bandwidth, "yes" if profile.bf16 else "no", Text(profile.description))
    return table


def report_lines(report: Mapping[str, Any]) -> list[RenderableType]:
    """A run's report: its numbers, the held-out losses, or rewards, as a curve, and the samples."""
    tables = {"evaluations", "samples"}
    told = {name: value for name, value in report.items() if name not in tables and value is not None}
    parts: list[RenderableType] = [*facts_lines(told)]
    evaluations = report.get("evaluations") or {}
    measure = "reward" if any(found.get("reward") is not None for found in evaluations.values()) else "loss"
    found = (evaluations[step][measure] for step in sorted(evaluations, key=int))
    values = [value for value in found if value is not None]  # null: it was not finite
    if values:
        line = (curve(values), "cyan")
        name = (f"held-out {measure}  ", "bold")
        parts.append(Text.assemble(name, f"{values[0]:.4f} ", line, f" {values[-1]:.4f}"))
    return [*parts, samples_table(report["samples"])] if report.get("samples") else parts


def facts_lines(facts: Mapping[str, Any], *, indent: int = 0) -> list[Text]:
    """Any object as names and values; what is nested is set in, and bytes are written for people."""
    lines = []
    width = max((len(_title(name)) for name, value in facts.items() if not _is_nested(value)), default=0)
    for name, value in facts.items():
        if not _is_nested(value):
            lines.append(Text.assemble(" " * indent, (f"{_title(name):{width}}", "bold"), f"  {_value(name, value)}"))
        elif value:
            nested = (
                value
                if isinstance(value, Mapping)
                else dict(zip(map(str, range(1, len(value) + 1)), value, strict=True))
            )
            lines += [Text(" " * indent + _title(name), "bold"), *facts_lines(nested, indent=indent + 2)]
    return lines


def _is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def fact(name: str, text: str, style: str = "") -> Text:
    """A line with its subject in front."""
    return Text.assemble((f"{name:9}", "bold"), (text, style))


def _title(name: str) -> str:
    name = name.removesuffix("_bytes")
    return (name if name.endswith("_per_s") else name.removesuffix("_s")).replace("_", " ")


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and isinstance(value, (int, float)):
        return format_bytes(value)
    if name.endswith("_s") and not name.endswith("per_s") and isinstance(value, (int, float)):
        return duration(value)
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
