"""A sweep for people: a picture in the terminal, or in a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from agzo_edge.errors import UsageError
from agzo_edge.units import GIB, format_bytes

if TYPE_CHECKING:
    from agzo_edge.budget.sweep import Cell, Sweep

COLUMNS_WITH_SIZES = 72  # below it the picture stands without its numbers
_MARKS = {"fits": ("█", "green"), "in pieces": ("▒", "yellow"), "refused": ("·", "red")}
_COLOURS = {"fits": "#7fbf7b", "in pieces": "#fee08b", "refused": "#d6604d"}
_IMAGE_KINDS = (".png", ".svg", ".pdf")


def sweep_lines(sweep: "Sweep", *, columns: int) -> list[RenderableType]:
    """Length of rows down, examples in a step across: what fits, and in GiB what it takes."""
    with_sizes = columns >= COLUMNS_WITH_SIZES
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("tokens", justify="right", no_wrap=True)
    rows = _rows(sweep.cells)
    for cell in rows[0]:
        table.add_column(str(cell.batch_size), justify="right" if with_sizes else "center", no_wrap=True)
    for row in rows:
        table.add_row(f"{row[0].max_seq_length:,}", *(_shown(cell, with_sizes=with_sizes) for cell in row))
    legend = Text.assemble(
        *((f"{mark} {outcome}  ", style) for outcome, (mark, style) in _MARKS.items()),
        f"limit {format_bytes(sweep.limit_bytes)}" + (", sizes in GiB" if with_sizes else ""),
    )
    return [Text("examples in a step", "dim"), table, legend]


def save_sweep_image(sweep: "Sweep", file: Path) -> None:
    """Write the picture to `file`. Raises UsageError without matplotlib, or for a kind of file that is no picture."""
    if file.suffix.lower() not in _IMAGE_KINDS:
        raise UsageError(f"--sweep-image {file}: the name must end in {', '.join(_IMAGE_KINDS)}")
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--sweep-image needs matplotlib: pip install matplotlib") from None
    rows = _rows(sweep.cells)
    outcomes = list(_MARKS)
    figure = Figure(figsize=(1.1 * len(rows[0]) + 1, 0.6 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        [[outcomes.index(cell.outcome) for cell in row] for row in rows],
        cmap=ListedColormap([_COLOURS[outcome] for outcome in outcomes]),
        vmin=0,
        vmax=len(outcomes) - 1,
        aspect="auto",
    )
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            text = f"{cell.device_bytes / GIB:.1f}" + ("\nin pieces" if cell.outcome == "in pieces" else "")
            axes.text(x, y, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(rows[0])), [str(cell.batch_size) for cell in rows[0]])
    axes.set_yticks(range(len(rows)), [f"{row[0].max_seq_length:,}" for row in rows])
    axes.set_xlabel("examples in a step")
    axes.set_ylabel("tokens in a row")
    axes.set_title(f"{sweep.profile_name}: GiB at the peak, of {format_bytes(sweep.limit_bytes)} allowed", fontsize=10)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UsageError(f"--sweep-image {file}: cannot be written: {error.strerror}") from None


def _rows(cells: "Sequence[Cell]") -> list[list["Cell"]]:
    """The cells of each length."""
    lengths = dict.fromkeys(cell.max_seq_length for cell in cells)
    return [[cell for cell in cells if cell.max_seq_length == length] for length in lengths]


def _shown(cell: "Cell", *, with_sizes: bool) -> Text:
    mark, style = _MARKS[cell.outcome]
    return Text(f"{cell.device_bytes / GIB:.1f} {mark}" if with_sizes else mark, style)
