"""The two streams as rich sees them. Made anew for each use: a test gives the process other streams."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType

from agzo_edge.cli.as_json import json_line

FILE_COLUMNS = 120  # of a table that goes to a file or a pipe


def stdout_console() -> Console:
    """Results; plain text without control characters when it is no terminal."""
    return _console(stderr=False)


def stderr_console() -> Console:
    """Messages for people."""
    return _console(stderr=True)


def print_lines(console: Console, lines: Sequence[RenderableType]) -> None:
    """Print each line as it is: a terminal folds it at words, and nothing else breaks it."""
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)


def say(text: str) -> None:
    """Write `text` to stdout exactly as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """Write `value` to stdout as one line of JSON, at once."""
    sys.stdout.write(json_line(value) + "\n")
    sys.stdout.flush()


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    fixed = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, width=FILE_COLUMNS if fixed else None, highlight=False, markup=False, emoji=False)
