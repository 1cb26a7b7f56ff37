"""Watching a run: live on a terminal, in plain lines elsewhere, as JSON lines for programs."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from agzo_edge.cli.as_json import event_object
from agzo_edge.cli.consoles import print_lines, stdout_console, write_json
from agzo_edge.cli.course import Course
from agzo_edge.cli.ending_view import before_after, best_adapter, cost_lines, ending_lines, generate_command
from agzo_edge.cli.run_view import evaluation_line, event_lines, live_view, step_line
from agzo_edge.cli.screen import samples_table

if TYPE_CHECKING:
    from agzo_edge.events import Event, Run

PLAIN_STEP_LINES = 20  # in a whole run
REDRAWS_PER_S = 4
PROMPT_CHARACTERS = 200  # of one that a person may want to copy
DEFAULT_PROMPT = "Tell me about yourself."


def watch_json(events: "Iterable[Event]") -> None:
    """Write each event as a line of JSON."""
    for event in events:
        write_json(event_object(event))


def watch(events: "Iterable[Event]", console: Console) -> None:
    """Show a run to a person: with a live view on a terminal, in lines anywhere else."""
    from agzo_edge.events import Finished

    if not is_live(console):
        show = _printing(console)
        for event in events:
            show(event)
        return
    course = Course()
    with _drawing(course, console):
        for event in events:
            course.take(event)
            print_lines(console, event_lines(event))
            if isinstance(event, Finished):
                run = event.run
    print_result(console, course, run)


def show_progress() -> "Callable[[Event], None]":
    """What prints a run in lines on stdout while it goes: `finetune(..., observe=show_progress())`."""
    return _printing(stdout_console())


def _printing(console: Console) -> "Callable[[Event], None]":
    """What prints a run's events in lines, and at its end what came of it."""
    course = Course()

    def show(event: "Event") -> None:
        nonlocal course
        from agzo_edge.events import Finished

        course.take(event)
        print_lines(console, [*event_lines(event), *progress_lines(course, event)])
        if isinstance(event, Finished):
            print_result(console, course, event.run)
            course = Course()  # another run may follow

    return show


def _drawing(course: Course, console: Console) -> Live:
    return Live(
        console=console,
        get_renderable=lambda: live_view(course),
        refresh_per_second=REDRAWS_PER_S,
        transient=True,
    )


def progress_lines(course: Course, event: "Event") -> list[Text]:
    """What stands in for the live view elsewhere: every evaluation, and some of the steps."""
    from agzo_edge.events import Evaluated, Stepped

    if isinstance(event, Evaluated):
        return [evaluation_line(event.step, event.metrics)]
    return [step_line(course)] if isinstance(event, Stepped) and _is_told(course) else []


def is_live(console: Console) -> bool:
    """Whether the console can draw over what it has drawn."""
    return console.is_terminal and not console.is_dumb_terminal


def _is_told(course: Course) -> bool:
    """Whether the step just done gets a line: the last one, and evenly spread ones before it."""
    every = max(1, -(-course.n_steps // PLAIN_STEP_LINES))
    return course.steps_done % every == 0 or course.steps_done == course.n_steps


def print_result(console: Console, course: Course, run: "Run") -> None:
    """Print what came of a run, and how to use it."""
    assert course.planned is not None
    samples = run.report.get("samples") or []
    console.print()
    told = run.report.get("evaluations") or {}  # a resumed run's earlier ones too
    losses = [told[step]["loss"] for step in sorted(told, key=int)] or course.held_out_losses
    if run.before is not None and run.after is not None and len(losses) > 1:
        print_lines(console, before_after(run.before, run.after, course, losses))
    elif run.after is not None:
        print_lines(console, [evaluation_line(int(run.report["steps"]), run.after)])
    print_lines(console, ending_lines(run, course))
    print_lines(console, cost_lines(run))
    console.print()
    if samples:
        console.print(samples_table(samples))
        console.print()
    prompt = samples[0]["prompt"] if samples else course.prompt
    if not prompt or len(prompt) > PROMPT_CHARACTERS:
        prompt = DEFAULT_PROMPT
    config = course.planned.config
    adapter = best_adapter(run, config.metric_for_best_model) or run.adapter
    command = generate_command(config, str(adapter), prompt)
    console.print("try it", style="bold")
    console.print(command, soft_wrap=True)  # one line, to be copied whole
