"""What people see of `doctor --numerics`: the error of finite differences over mu, as a table that is a picture."""

import math
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from agzo_edge.cli.screen import fact

if TYPE_CHECKING:
    from agzo_edge.train.fidelity import Fidelity

COLUMNS_PER_DECADE = 8
SMALLEST, LARGEST = 1e-4, 10.0  # errors at which a bar is empty and full


def fidelity_table(seen: "Fidelity") -> Table:
    """A row for each size: its error, and a bar of the error's logarithm."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("mu", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column(f"from {SMALLEST:g} of the signal to {LARGEST:g} times", no_wrap=True)
    for size, error in zip(seen.sizes, seen.errors, strict=True):
        is_auto = size == seen.probe.mu
        bar = Text(error_bar(error), "green" if is_auto else "cyan")
        told = f"{error:.2g}" if math.isfinite(error) else "not finite"
        table.add_row(f"{size:g}", told, bar.append("  <- mu auto" if is_auto else ""))
    return table


def error_bar(error: float) -> str:
    """A bar of one length for each decade of the error; full when it is not finite."""
    shown = min(max(error, SMALLEST), LARGEST) if math.isfinite(error) else LARGEST
    return "█" * round(COLUMNS_PER_DECADE * math.log10(shown / SMALLEST))


def fidelity_lines(seen: "Fidelity") -> list[Text]:
    """What the probe saw without knowing the exact derivative, and what to train with."""
    return [fact("floor", f"{seen.probe.noise_floor:.2g}, as mu auto estimates its error"), fact("advice", seen.advice)]
