"""The flags that are no setting of a run, spelled once for all commands."""

from pathlib import Path
from typing import Annotated

import typer

from agzo_edge.presets import PRESETS

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="TOML file of settings; flags win over it."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(PRESETS),
        help="Starting values of all settings; paper is AGZO's Algorithm 1.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and nothing else.")]
Resume = Annotated[
    bool, typer.Option("--resume-from-checkpoint", help="Go on with the interrupted run in --output-dir.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the memory plan and stop: the command `plan`.")]
Adapter = Annotated[str | None, typer.Option(metavar="DIR", help="Adapter to put on the model.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The --output-dir of a run.")]
Prompt = Annotated[str, typer.Option(metavar="TEXT", help="What to answer; - reads it from stdin.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message that the conversation begins with.")]
