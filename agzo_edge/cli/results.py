"""`replay`, `export`, `report`, `profiles` and `doctor`: no run of its own, only what is there."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from agzo_edge.cli.consoles import print_lines, say, stdout_console, write_json
from agzo_edge.cli.flags import AsJson, RunDir
from agzo_edge.cli.screen import facts_lines, profiles_table, report_lines
from agzo_edge.errors import UsageError


def replay(
    run_dir: RunDir,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the adapter goes.")] = None,
    until_step: Annotated[int | None, typer.Option(min=0, help="Stop after so many steps.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild a run's adapter from its journal alone: no data, no model."""
    from agzo_edge import api

    adapter = api.replay(run_dir, output=output, until_step=until_step)
    _show_adapter(adapter, as_json=as_json)


def export(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="Adapter to write in another form.")],
    to: Annotated[Literal["peft", "merged", "gguf"], typer.Option(help="An adapter, a whole model, or llama.cpp's.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where it goes.")],
    model: Annotated[str | None, typer.Option(metavar="DIR|HUB_ID", help="Base model, where it is not known.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another form."""
    from agzo_edge import api
    from agzo_edge.cli.quiet import hide_loading_bars

    hide_loading_bars()
    _show_adapter(api.export(adapter, to=to, output=output, model=model), as_json=as_json)


def _show_adapter(directory: Path, *, as_json: bool) -> None:
    if as_json:
        write_json({"output": directory})
    else:
        say(f"written: {directory}")


def report(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Tell what a run cost and what it gave."""
    from agzo_edge import api

    facts = api.report(run_dir)
    if as_json:
        write_json(facts)
        return
    print_lines(stdout_console(), report_lines(facts))


def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine has, and what is missing."""
    from agzo_edge import api

    facts = api.doctor()
    if as_json:
        write_json(facts)
    else:
        print_lines(stdout_console(), facts_lines(facts))


def profiles(
    action: Annotated[Literal["show"] | None, typer.Argument(help="show prints one profile.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The profile to show.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the machine profiles, or show one: `profiles show NAME`."""
    from agzo_edge.budget.profile import load_profile, profile_folder, profile_names

    if action is None:
        known = [load_profile(each) for each in profile_names()]
        if as_json:
            write_json([profile.model_dump(mode="json") for profile in known])
        else:
            stdout_console().print(profiles_table(known))
        return
    if name is None:
        raise UsageError(f"profiles show needs a name: one of {', '.join(profile_names())}")
    profile = load_profile(name)
    if as_json:
        write_json(profile.model_dump(mode="json"))
    else:
        say((profile_folder() / f"{name}.toml").read_text(encoding="utf-8").rstrip("\n"))
