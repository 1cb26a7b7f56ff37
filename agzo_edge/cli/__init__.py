"""The command `agzo-edge`: flags in, tables and progress out, exit codes."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    from agzo_edge.cli.run import exit_code_of

    sys.exit(exit_code_of(list(sys.argv[1:] if arguments is None else arguments)))
