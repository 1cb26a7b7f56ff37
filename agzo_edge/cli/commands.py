"""All commands under one name. Each reads its flags, calls one verb of the API, and shows what comes back.

The API loads torch, so a command imports it when it runs: `--help` must not wait for it.
"""

import shutil
from importlib.metadata import version
from typing import Annotated

import typer

from agzo_edge.cli.results import doctor, export, profiles, replay, report
from agzo_edge.cli.training import plan, train
from agzo_edge.cli.using import chat, evaluate, generate

PANEL_COLUMNS = 110  # narrower, the panels of a command's help would cut the flags' names short

app = typer.Typer(
    name="agzo-edge",
    epilog="Exit codes: 0 done, 1 failure, 2 bad usage or data, 3 does not fit the budget, 4 budget broken, "
    "130 and 143 stopped by a signal.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= PANEL_COLUMNS else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def agzo_edge(
    context: typer.Context,
    wants_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Fine-tune quantized language models with forward passes only, inside a memory budget."""
    if wants_version:
        typer.echo(f"agzo-edge {version('agzo-edge')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.callback(invoke_without_command=True)(agzo_edge)
app.command()(train)
app.command()(plan)
app.command("estimate", hidden=True)(plan)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(replay)
app.command()(export)
app.command()(report)
app.command()(profiles)
app.command()(doctor)
