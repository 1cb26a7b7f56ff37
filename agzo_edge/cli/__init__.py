"""The command `agzo-edge`: flags in, tables and progress out, exit codes."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    from agzo_edge.cli.run import exit_code_of

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # as long as the process lives
    sys.exit(exit_code_of(list(sys.argv[1:] if arguments is None else arguments)))
