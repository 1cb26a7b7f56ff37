"""benchmarks/kill.py and benchmarks/fuzz.py with few cases; the full counts are in benchmarks/results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def result_of(name: str, output: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark leaves; it must find nothing lost."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--output", str(output), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_runs_killed_from_outside_inside_a_write_and_by_the_power_end_bitwise_equal(tmp_path: Path) -> None:
    trials = result_of("kill", tmp_path / "kill.json", "--kills", "6", "--seed", "1")["trials"]
    assert [trial["deaths"][0]["kind"] for trial in trials] == ["time", "torn", "power"] * 2
    assert sum(trial["steps_lost"] for trial in trials) == 0
    assert all(all(trial["equal"].values()) and trial["replay_equal"] for trial in trials)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited the way Linux does it")
def test_two_thousand_damaged_files_are_refused_or_read_right(tmp_path: Path) -> None:
    summary = result_of("fuzz", tmp_path / "fuzz.json", "--cases", "2000", "--seed", "1")["summary"]
    assert summary[-1]["cases"] == 2000
    assert not any(row[bad] for row in summary for bad in ("wrong", "exception", "hang"))
