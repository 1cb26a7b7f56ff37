"""`replay`, `export`, `report`, `profiles` and `doctor`: no run of its own, only what is there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agzo_edge.cli.as_json import fidelity_object
from agzo_edge.cli.consoles import print_lines, say, stdout_console, write_json
from agzo_edge.cli.flags import AsJson, RunDir
from agzo_edge.cli.options import as_flags, given, with_settings
from agzo_edge.cli.screen import facts_lines, profiles_table, report_lines
from agzo_edge.errors import UsageError
from agzo_edge.units import format_bytes


def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="The --output-dir of a run, or an exported run.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the adapter goes.")] = None,
    until_step: Annotated[int | None, typer.Option(min=0, help="Stop after so many steps.")] = None,
    skip: Annotated[str | None, typer.Option(metavar="A:B", help="Leave out the steps from A to before B.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild a run's adapter from its journal alone: no data, no model."""
    from agzo_edge import api

    adapter = api.replay(run_dir, output=output, until_step=until_step, skip=_steps(skip))
    _show_output(adapter, as_json=as_json)


def _steps(text: str | None) -> range:
    """The steps that A:B means, counted from 0 as in the journal."""
    if text is None:
        return range(0)
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal()) or int(first) >= int(end):
        raise UsageError(f"--skip {text}: write two steps as A:B with A below B; the journal counts them from 0")
    return range(int(first), int(end))


def export(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="Adapter, or run, to write in another form.")],
    to: Annotated[
        Literal["peft", "merged", "gguf", "replay"],
        typer.Option(help="An adapter, a whole model, llama.cpp's, or a run."),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where it goes.")],
    model: Annotated[str | None, typer.Option(metavar="DIR|HUB_ID", help="Base model, where it is not known.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another form."""
    from agzo_edge import api
    from agzo_edge.cli.quiet import hide_loading_bars

    hide_loading_bars()
    _show_output(api.export(adapter, to=to, output=output, model=model), as_json=as_json, beside=adapter)


def _show_output(output: Path, *, as_json: bool, beside: Path | None = None) -> None:
    """Where it was written; of a file also its size beside the adapter's weights."""
    sizes = {}
    if output.is_file() and beside is not None and (weights := beside / "adapter_model.safetensors").is_file():
        sizes = {"bytes": output.stat().st_size, "adapter_bytes": weights.stat().st_size}
    if as_json:
        write_json({"output": output, **sizes})
        return
    say(f"written: {output}")
    if sizes:
        say(f"{format_bytes(sizes['bytes'])}; the adapter's weights take {format_bytes(sizes['adapter_bytes'])}")


def report(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Tell what a run cost and what it gave."""
    from agzo_edge import api

    facts = api.report(run_dir)
    if as_json:
        write_json(facts)
        return
    print_lines(stdout_console(), report_lines(facts))


@with_settings("Model", "Data", "Memory", without=("adapter", "eval_data"))
def doctor(
    numerics: Annotated[
        bool, typer.Option("--numerics", help="Measure how faithful finite differences are with a model, over mu.")
    ] = False,
    as_json: AsJson = False,
    **settings: object,
) -> None:
    """Tell what this machine has, and what is missing; or, with --numerics, which mu a model wants here."""
    from agzo_edge import api

    if numerics:
        _show_fidelity(given(settings), as_json=as_json)
        return
    if settings := given(settings):
        raise UsageError(f"doctor looks at the machine: {' '.join(as_flags(settings))} needs --numerics beside it")
    facts = api.doctor()
    if as_json:
        write_json(facts)
    else:
        print_lines(stdout_console(), facts_lines(facts))


def _show_fidelity(settings: Mapping[str, Any], *, as_json: bool) -> None:
    from agzo_edge import api
    from agzo_edge.cli.fidelity_view import fidelity_lines, fidelity_table
    from agzo_edge.cli.quiet import hide_loading_bars

    hide_loading_bars()
    seen = api.check_numerics(**settings)
    if as_json:
        write_json(fidelity_object(seen))
        return
    console = stdout_console()
    console.print(fidelity_table(seen))
    print_lines(console, fidelity_lines(seen))


def profiles(
    action: Annotated[Literal["show"] | None, typer.Argument(help="show prints one profile.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The profile to show.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the machine profiles, or show one: `profiles show NAME`."""
    from agzo_edge.budget.profile import load_profile, profile_file, profile_names

    if action is None:
        known = [load_profile(each) for each in profile_names()]
        if as_json:
            write_json([profile.model_dump(mode="json") for profile in known])
        else:
            stdout_console().print(profiles_table(known))
        return
    if name is None:
        raise UsageError(f"profiles show needs a name: one of {', '.join(profile_names())}")
    if name == "auto":
        raise UsageError("auto is what is found on this machine: `agzo-edge doctor` tells it")
    profile = load_profile(name)
    if as_json:
        write_json(profile.model_dump(mode="json"))
    else:
        say(profile_file(name).read_text(encoding="utf-8").rstrip("\n"))
