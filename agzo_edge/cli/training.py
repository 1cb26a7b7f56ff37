"""`train` and `plan`."""

import shlex
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agzo_edge.cli.consoles import print_lines, stdout_console, write_json
from agzo_edge.cli.flags import AsJson, ConfigFile, DryRun, Preset, Resume
from agzo_edge.cli.options import as_flags, given, with_settings
from agzo_edge.cli.screen import comparison, fact, plan_table, verdict
from agzo_edge.config import RunConfig
from agzo_edge.errors import BudgetError

if TYPE_CHECKING:
    from agzo_edge.budget.memory import MemoryPlan
    from agzo_edge.budget.sweep import Sweep
    from agzo_edge.cli.stop import StopSignals


@with_settings()
def train(
    context: typer.Context,
    config_file: ConfigFile = None,
    preset: Preset = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    **settings: object,
) -> None:
    """Fine-tune a model on data and leave an adapter; without --model and --data, run the demo."""
    from agzo_edge import api

    if dry_run:
        show_plan(api.plan(config_file=config_file, preset=preset, **given(settings)), as_json=as_json)
        return
    resolved = partial(api.resolve, given(settings), config_file=config_file, preset=preset)
    config = resolved(resume=resume)
    if not resume and not as_json and _wants_to_resume(config):
        resume, config = True, resolved(resume=True)
    _watched(config, context.obj, resume=resume, as_json=as_json)


def _wants_to_resume(config: RunConfig) -> bool:
    """The answer of the person at the terminal, when the output directory holds an unfinished run."""
    from agzo_edge import api
    from agzo_edge.errors import AdapterError

    if config.output_dir is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        found = api.report(config.output_dir)
    except AdapterError:
        return False  # no run: whatever else is there is refused later, with its reason
    if found["finished"]:
        return False
    done = f"{found['steps']} of {found['max_steps']} steps"
    return typer.confirm(f"{config.output_dir} holds an unfinished run ({done}). Go on with it?", default=True)


def _watched(config: RunConfig, stop: "StopSignals", *, resume: bool, as_json: bool) -> None:
    """Train, and show it."""
    from agzo_edge.cli.quiet import hide_loading_bars
    from agzo_edge.cli.stop import stoppable
    from agzo_edge.cli.watch import watch, watch_json
    from agzo_edge.events import Stepped
    from agzo_edge.session import training

    hide_loading_bars()
    stop.remedy = f"go on with {_to_resume(config)}"
    with closing(training(config, resume=resume)) as events:
        watched = stoppable(events, stop, defer_from=Stepped)
        if as_json:
            watch_json(watched)
        else:
            watch(watched, stdout_console())


def _to_resume(config: RunConfig) -> str:
    """The flags that go on with a run: its directory, and what lets code run, which no file may say."""
    code = {"objective": "reward", "reward": config.reward} if ":" in (config.reward or "") else {}
    words = as_flags({"output_dir": config.output_dir, **code, "trust_remote_code": config.trust_remote_code or None})
    return shlex.join([*words, "--resume-from-checkpoint"])


@with_settings()
def plan(
    config_file: ConfigFile = None,
    preset: Preset = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Show which lengths of rows and batches fit.")] = False,
    sweep_image: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write the sweep as a picture; needs matplotlib.")
    ] = None,
    as_json: AsJson = False,
    **settings: object,
) -> None:
    """Show the memory that `train` with the same flags would need; nothing is loaded. Alias: estimate."""
    from agzo_edge import api

    if sweep or sweep_image is not None:
        found = api.sweep(config_file=config_file, preset=preset, **given(settings))
        show_sweep(found, image=sweep_image, as_json=as_json)
        return
    show_plan(api.plan(config_file=config_file, preset=preset, **given(settings)), as_json=as_json)


def show_sweep(sweep: "Sweep", *, image: Path | None, as_json: bool) -> None:
    """Show which runs fit, and leave the picture where it was asked for."""
    from agzo_edge.cli.sweep_view import save_sweep_image, sweep_lines

    if image is not None:
        save_sweep_image(sweep, image)
    if as_json:
        write_json(sweep.to_dict())
        return
    console = stdout_console()
    print_lines(console, sweep_lines(sweep, columns=console.width))


def show_plan(memory_plan: "MemoryPlan", *, as_json: bool) -> None:
    """Show the plan and its verdict, and leave with exit code 3 when `train` would refuse it."""
    if as_json:
        write_json(memory_plan.to_dict())
    else:
        console = stdout_console()
        console.print(plan_table(memory_plan, columns=console.width))
        console.print()
        console.print(verdict(memory_plan))
        console.print(comparison(memory_plan))
        rows = (
            f"counted with {memory_plan.row_tokens:,} tokens, the most they may have; `train` plans by those it finds"
        )
        print_lines(console, [fact("rows", rows), *(fact("note", note, "yellow") for note in memory_plan.notes)])
    if not memory_plan.can_run:
        raise typer.Exit(BudgetError.exit_code)
