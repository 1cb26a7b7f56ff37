"""From arguments to an exit code: every way a command can end is told here, once."""

import errno
import sys
from collections.abc import Sequence

import typer
from rich.text import Text

from agzo_edge.cli.as_json import error_object
from agzo_edge.cli.commands import app
from agzo_edge.cli.consoles import stderr_console, write_json
from agzo_edge.cli.quiet import quiet_libraries
from agzo_edge.cli.stop import Stopped, handled_signals
from agzo_edge.errors import AgzoError, UsageError

# UsageError, what typer raises for a wrong flag or argument. It has no public name in all versions:
# newer ones carry their own copy of click.
_WRONG_USAGE: type[Exception] = typer.BadParameter.__bases__[0]

_HERE = {  # what other trainers call it: what it is here
    "--lr": "--learning-rate",
    "--lora-r": "--adapter-rank",
    "--lora-rank": "--adapter-rank",
    "--r": "--adapter-rank",
    "--num-train-epochs": "--max-steps, each of --batch-size examples",
    "--epochs": "--max-steps, each of --batch-size examples",
    "--num-epochs": "--max-steps, each of --batch-size examples",
    "--iters": "--max-steps",
    "--per-device-train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--micro-batch-size, which divides --batch-size",
    "--max-length": "--max-seq-length",
    "--model-name-or-path": "--model",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--train-file": "--data",
    "--validation-file": "--eval-data",
    "--lr-scheduler-type": "--lr-schedule",
    "--output": "--output-dir",
}
ABORTED = 130  # as after Ctrl-C


def exit_code_of(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` name; its exit code.

    A failure is told on stderr in one message, and with --json on stdout as an object as well.
    What nobody foresaw is raised.
    """
    as_json = "--json" in arguments
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without our block characters shows "?"
    try:
        with quiet_libraries(), handled_signals() as stop:
            code = app(list(arguments), prog_name="agzo-edge", standalone_mode=False, obj=stop)
            return code if isinstance(code, int) else 0
    except (AgzoError, Stopped) as error:
        return _failed(error, exit_code=error.exit_code, as_json=as_json)
    except typer.Abort:  # Ctrl-D at a question
        return _failed(AgzoError("stopped: a question had no answer"), exit_code=ABORTED, as_json=as_json)
    except _WRONG_USAGE as error:
        return _failed(_usage_error(error), exit_code=UsageError.exit_code, as_json=as_json)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:  # files of ours are told of by name
            raise
        told = "the output cannot be written: its disk is full. What a run has done is in its directory"
        return _failed(AgzoError(told), exit_code=AgzoError.exit_code, as_json=False)
    except Exception as error:
        if as_json:
            write_json(error_object(error, exit_code=1))
        raise


def _usage_error(error: Exception) -> UsageError:
    """typer's complaint in its own words, with where to read on."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    name = getattr(error, "option_name", "")
    here = _HERE.get(name, "")
    known = {option for parameter in context.command.params for option in parameter.opts} if context else set()
    if here.split(",")[0] in known:
        message = f"No such option: {name}; here it is {here}"
    command = context.command_path if context is not None else "agzo-edge"
    return UsageError(f"{message}\nsee: {command} --help")


def _failed(error: BaseException, *, exit_code: int, as_json: bool) -> int:
    """`exit_code`, after the error has been told."""
    if as_json:
        write_json(error_object(error, exit_code=exit_code))
    console = stderr_console()
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=not console.is_terminal)
    return exit_code
