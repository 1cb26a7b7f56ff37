import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from agzo_edge.budget.sweep import Cell, Sweep
from agzo_edge.cli import main
from agzo_edge.cli.sweep_view import save_sweep_image, sweep_lines
from agzo_edge.errors import UsageError
from agzo_edge.units import GIB

SWEEP = Sweep(
    profile_name="a card",
    limit_bytes=4 * GIB,
    cells=(
        Cell(128, 1, GIB, GIB, "fits", ""),
        Cell(128, 2, 5 * GIB, 3 * GIB, "in pieces", "micro-batches of 1"),
        Cell(256, 1, 3 * GIB, 3 * GIB, "fits", ""),
        Cell(256, 2, 9 * GIB, 9 * GIB, "refused", ""),
    ),
)


def shown(columns: int) -> list[str]:
    console = Console(file=StringIO(), width=columns, color_system=None)
    for line in sweep_lines(SWEEP, columns=columns):
        console.print(line)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_picture_has_a_mark_for_each_run_and_its_size_where_there_is_room() -> None:
    wide = shown(100)
    assert wide[2].split() == ["128", "1.0", "█", "3.0", "▒"]
    assert wide[3].split() == ["256", "3.0", "█", "9.0", "·"]
    narrow = shown(40)
    assert narrow[2].split() == ["128", "█", "▒"]
    assert max(map(len, narrow)) <= 40


def test_an_image_is_written_and_is_one(tmp_path: Path) -> None:
    save_sweep_image(SWEEP, tmp_path / "fits.png")
    assert (tmp_path / "fits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["fits", "fits.toml", "no/such/folder/fits.png"])
def test_a_file_that_cannot_be_a_picture_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--sweep-image"):
        save_sweep_image(SWEEP, tmp_path / name)


def test_the_command_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--profile", "gtx-1650-4gb", "--sweep-image", str(tmp_path / "s.svg"), "--json"])
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["outcome"] == "fits"
    assert "svg" in (tmp_path / "s.svg").read_text()
