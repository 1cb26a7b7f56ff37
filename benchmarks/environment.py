"""Where and when a benchmark ran, and the JSON file that every benchmark leaves."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import agzo_edge

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real models and data beside the checkout, no part of the project
PACKAGES = ("torch", "transformers", "bitsandbytes", "numpy")


def environment() -> dict[str, Any]:
    """The machine, the versions and the moment."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "agzo_edge", "benchmarks")),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
            "load_1min": round(os.getloadavg()[0], 2),  # of other programs as well: above 1, times are noisy
        },
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"agzo-edge": agzo_edge.__version__} | {name: version(name) for name in PACKAGES},
    }


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1) if found else platform.processor()


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the two arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(
        prog=f"benchmarks/{name}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it works; numbers mean nothing"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    return parser


def leave_result(
    arguments: argparse.Namespace, *, began: dict[str, Any], summary: list[dict[str, Any]], **raw: Any
) -> None:
    """Print `summary` as a table, write everything as JSON, and print the file's path as the last line.

    `began` is the `environment` at the start, when the load was still that of others.
    """
    result = {**began, "settings": vars(arguments), "summary": summary, **raw}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, allow_nan=False, default=str) + "\n", encoding="utf-8")
    table = Table(*summary[0])
    for row in summary:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if Console().is_terminal else 160).print(table)
    print(arguments.output)
