"""Everything that can go wrong for a person, each with its exit code.

    AgzoError                  1   failure while running
    ├── UsageError             2   bad usage, configuration, model or data
    │   ├── ConfigError            a flag, a field of a TOML file, a profile
    │   ├── ModelError             a checkpoint that cannot be read or adapted
    │   ├── DataError              a data file, with file and line
    │   └── AdapterError           an adapter, a journal or a run directory
    ├── BudgetError            3   the run does not fit its limit; nothing was learned
    ├── BudgetBrokenError      4   the limit was passed while running
    ├── NonFiniteLossError     1   a loss was NaN or infinite; the rows are named
    └── RewardError            1   a reward failed while running; the row is named

An assertion is for our own mistakes; these are for the user's. A message names the thing,
its value, the limit, and the first thing to try.
"""

from collections.abc import Sequence


class AgzoError(Exception):
    """A failure with a message for a person; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(AgzoError):
    """Something the user gave cannot be used: nothing is written, but for a run that meets a bad row on its way."""

    exit_code = 2


class ConfigError(UsageError):
    """A flag, a field of a configuration file, or a profile is wrong."""


class ModelError(UsageError):
    """A checkpoint cannot be read, or holds what AGZO cannot adapt."""


class DataError(UsageError):
    """A data file cannot be used. The message names the file and the line."""


class AdapterError(UsageError):
    """An adapter, a journal or a run directory cannot be used."""


class BudgetError(AgzoError):
    """The run does not fit its limit: by its plan, before a weight is loaded, or by its longest rows, before a step."""

    exit_code = 3


class BudgetBrokenError(AgzoError):
    """The limit was passed while running."""

    exit_code = 4


class NonFiniteLossError(AgzoError):
    """A loss was NaN or infinite; the message names the step and the rows."""


class RewardError(AgzoError):
    """A reward raised, gave no number, or took too long; the message names the row."""


def numbered(faults: Sequence[str], *, shown: int = 20) -> str:
    """The faults one per line, the first `shown` in full and the rest counted."""
    lines = [f"  {fault}" for fault in faults[:shown]]
    if len(faults) > shown:
        lines.append(f"  ... and {len(faults) - shown:,} more")
    return "\n".join(lines)
