"""What people see of a run: what is settled before it, where it stands, what came of it."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agzo_edge.cli.course import RECENT_STEPS, Course
from agzo_edge.cli.options import as_flags, panel_of
from agzo_edge.cli.screen import curve, duration, fact, metrics_text
from agzo_edge.config import RunConfig
from agzo_edge.demo import demo_settings
from agzo_edge.units import format_bytes

if TYPE_CHECKING:
    from agzo_edge.budget.memory import MemoryPlan
    from agzo_edge.events import Event, Run
    from agzo_edge.train.data import DataReport, Sample
    from agzo_edge.train.evaluate import Metrics

N_LARGEST = 4  # components named in a summary
BAR_COLUMNS = 40
LOST_SIGNAL_ADVICE = (
    "rounding is half the signal or more whatever mu is: expect slow learning, or try --difference exact, which has "
    "no mu, or --dtype float32"
)
STRETCH_CHARACTERS = 160  # of each part of the example that is shown


def plan_summary(plan: "MemoryPlan", machine: str, changes: Sequence[str]) -> list[Text]:
    """The plan in a few lines: machine, peak, its largest parts, and what was changed so that it fits."""
    device = sorted((c for c in plan.components if c.where == "device"), key=lambda c: -c.n_bytes)
    largest = ", ".join(f"{c.name} {format_bytes(c.n_bytes)}" for c in device[:N_LARGEST] if c.n_bytes > 0)
    peak = f"{format_bytes(plan.device_bytes)} predicted peak of {format_bytes(plan.limit_bytes)} allowed"
    lines = [
        fact("machine", f"{machine}, {plan.dtype}"),
        fact("memory", peak),
        fact("", f"largest: {largest}", "dim"),
    ]
    return lines + [Text.assemble((f"{'changed':9}", "yellow"), change) for change in changes]


def data_line(name: str, report: "DataReport") -> Text:
    """One source in a line: rows, tokens, and what happened to the overlong ones."""
    of_file = f" of {report.rows_read:,}, read when needed" if report.streamed else ""
    longest = "longest row" if report.all_checked else "more are checked as they come: rows of up to"
    parts = [
        f"{report.rows_used:,} rows{of_file} ({report.format})",
        _learned(name, report),
        f"{longest} {report.longest_tokens:,} tokens",
    ]
    if report.rows_held_back:
        parts.append(f"{report.rows_held_back:,} rows held back from training, to see harm by")
    if report.rows_truncated:
        parts.append(f"{report.rows_truncated:,} truncated")
    if report.rows_dropped:
        parts.append(f"{report.rows_dropped:,} of {report.rows_dropped + report.rows_used:,} dropped")
    parts.append(f"{report.padding_share:.0%} padding")
    return fact(name, ", ".join(parts))


def _learned(name: str, report: "DataReport") -> str:
    """What is taken from a source's rows: a reward's have no tokens to learn, but what is written is judged."""
    if report.format == "prompt":
        return "answers are judged"
    return f"{report.label_tokens:,} tokens to {'learn' if name == 'data' else 'score'}"


def sample_lines(sample: "Sample") -> list[Text]:
    """The first example as the model reads it; what is learned stands «in marks», and in colour."""
    text = Text(f"{'':9}the first, learned «so»: ")
    for stretch, learned in sample:
        shown = _shortened(stretch.replace("\n", "↵"))
        text.append(f"«{shown}»" if learned else shown, "green" if learned else "dim")
    return [text] if sample else []


def _shortened(text: str) -> str:
    """The text with its middle left out where it is long."""
    half = STRETCH_CHARACTERS // 2
    return text if len(text) <= STRETCH_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def event_lines(event: "Event") -> list[Text]:
    """What is said of an event by itself; nothing for those that a table or a curve shows."""
    from agzo_edge.events import DataReady, ModelReady, Moved, MuChosen, Planned, WentBack

    match event:
        case Planned(plan=plan, machine=machine, changes=changes, notes=notes):
            return [*plan_summary(plan, machine, changes), *(fact("note", note, "yellow") for note in notes)]
        case DataReady(train=train, held_out=held_out, sample=sample):
            scored = [data_line("held out", held_out)] if held_out else []
            return [data_line("data", train), *sample_lines(sample), *scored]
        case ModelReady():
            line = f"{event.source}, {event.quantization} on {event.device}, {event.n_layers} layers learn"
            resumed = [fact("resumed", f"after step {event.first_step}")] if event.first_step else []
            return [fact("model", line), *resumed]
        case MuChosen(probe=probe):
            chosen = fact("mu", f"{probe.mu:g}, chosen by probing (noise floor {probe.noise_floor:.2g})")
            return [chosen, fact("", LOST_SIGNAL_ADVICE, "yellow")] if probe.is_lost else [chosen]
        case Moved(step=step, what=what):
            return [fact("memory", f"from step {step + 1}: {what}", "yellow")]
        case WentBack(step=step, to_step=to_step, learning_rate=rate):
            return [fact("undo", gone_back(step, to_step, rate), "yellow")]
    return []


def gone_back(step: int, to_step: int, rate: float) -> str:
    """What was taken back, and why; a `rate` of 0 is the run's end."""
    if rate:
        return f"steps {to_step + 1} to {step} had done harm and are taken back; the learning rate is now {rate:.2g}"
    if to_step:
        return f"steps {to_step + 1} to {step} had gained nothing by the end and are taken back"
    return (
        f"the watched rows are no better after {step} steps than chance makes them: all are taken back. More steps, or "
        f"more data, may show a gain; --undo-every 0 keeps whatever comes"
    )


def evaluation_line(step: int, metrics: "Metrics") -> Text:
    """One evaluation in a line."""
    return fact("held out", f"after step {step}: {metrics_text(metrics)}")


def step_line(course: Course) -> Text:
    """Where the run stands, in a line."""
    parts = [f"{course.steps_done}/{course.n_steps}", f"loss {course.loss or 0.0:.4f}"]
    if course.tokens_per_s is not None:
        parts.append(f"{course.tokens_per_s:,.0f} tokens/s")
    parts.append(f"peak {format_bytes(course.peak_bytes)}")
    if course.remaining_s:
        parts.append(f"{duration(course.remaining_s)} left")
    return fact("step", ", ".join(parts))


def live_view(course: Course) -> RenderableType:
    """Where the run stands, as a few lines with bars; before the first step, what it is doing."""
    if not course.recent:
        return Text(f"{course.doing}, {duration(course.elapsed_s)} ...", "dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True, min_width=8)
    grid.add_column(width=BAR_COLUMNS, no_wrap=True)
    grid.add_column()  # folds where the terminal is narrow: the other two keep their width
    left = f", {duration(course.remaining_s)} left" if course.remaining_s else ""
    grid.add_row(
        "step",
        ProgressBar(total=max(course.n_steps, 1), completed=course.steps_done),
        f"{course.steps_done}/{course.n_steps}, {course.doing}, {duration(course.elapsed_s)}{left}",
    )
    if course.loss is not None:
        speed = f"{course.tokens_per_s or 0:,.0f} tokens/s"
        grid.add_row("loss", f"{course.loss:.4f} in the last {min(RECENT_STEPS, len(course.recent))} steps", speed)
    if course.evaluations:
        grid.add_row("held out", Text(curve(course.held_out_losses), "cyan"), _latest(course))
    if course.planned and course.peak_bytes:
        limit = course.planned.plan.limit_bytes
        bar = ProgressBar(total=limit, completed=min(course.peak_bytes, limit), complete_style="green")
        grid.add_row("memory", bar, f"{format_bytes(course.peak_bytes)} of {format_bytes(limit)}")
    return grid


def _latest(course: Course) -> str:
    step, metrics = max(course.evaluations.items())
    accuracy = "" if metrics.accuracy is None else f", accuracy {metrics.accuracy:.1%}"
    return f"loss {metrics.loss:.4f}{accuracy} after step {step}"


def before_after(before: "Metrics", after: "Metrics", losses: Sequence[float]) -> list[Text]:
    """The held-out metrics from before to after, with the losses' curve in between."""
    change = f"{after.loss / before.loss - 1:+.0%}" if before.loss > 0 else ""
    style = "bold green" if after.loss < before.loss else "bold yellow"
    loss = Text.assemble(
        f"{before.loss:.4f} ", (curve(losses), "cyan"), " ", (f"{after.loss:.4f}", style), f"  {change}"
    )
    lines = [_result("held-out loss", loss)]
    if before.accuracy is not None and after.accuracy is not None:
        lines.append(_result("accuracy", f"{before.accuracy:.1%} -> {after.accuracy:.1%}"))
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
    return Text.assemble((f"{name:15}", "bold"), text)


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
