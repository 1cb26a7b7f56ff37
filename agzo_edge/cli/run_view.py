"""What people see of a run: what is settled before it, and where it stands."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agzo_edge.cli.course import Course
from agzo_edge.cli.screen import curve, duration, fact, metrics_text
from agzo_edge.units import format_bytes

if TYPE_CHECKING:
    from agzo_edge.budget.memory import MemoryPlan
    from agzo_edge.events import Event
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


def data_line(name: str, report: "DataReport", *, passes: float = 0.0) -> Text:
    """One source in a line: rows, tokens, what happened to the overlong ones, and how often each is taken."""
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
    if passes:
        parts.append(f"each taken {passes:,.1f} times" if passes >= 1 else f"{max(passes, 0.01):.0%} of them are taken")
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
        case DataReady(train=train, held_out=held_out, sample=sample, passes=passes):
            scored = [data_line("held out", held_out)] if held_out else []
            return [data_line("data", train, passes=passes), *sample_lines(sample), *scored]
        case ModelReady():
            held = "unquantized" if event.quantization == "none" else event.quantization
            line = f"{event.source}, {held} on {event.device}, {event.n_layers} layers learn"
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
    parts = [f"{course.steps_done}/{course.n_steps}", f"{course.measure} {_recent(course)}"]
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
    grid.add_row(course.measure, _recent(course), f"{course.tokens_per_s or 0:,.0f} tokens/s")
    if course.evaluations:
        line = curve([course.told(loss) for loss in course.held_out_losses])
        grid.add_row("held out", Text(line, "cyan"), _latest(course))
    if course.planned and course.peak_bytes:
        limit = course.planned.plan.limit_bytes
        bar = ProgressBar(total=limit, completed=min(course.peak_bytes, limit), complete_style="green")
        grid.add_row("memory", bar, f"{format_bytes(course.peak_bytes)} of {format_bytes(limit)}")
    return grid


def _recent(course: Course) -> str:
    """What the recent steps' losses were, or their rewards."""
    mean, n = course.recent_mean or 0.0, len(course.recent)
    return f"{mean:.4f} in the last {n} steps" if n > 1 else f"{mean:.4f}"


def _latest(course: Course) -> str:
    step, metrics = max(course.evaluations.items())
    accuracy = "" if metrics.accuracy is None else f", accuracy {metrics.accuracy:.1%}"
    return f"{course.measure} {course.told(metrics.loss):.4f}{accuracy} after step {step}"
