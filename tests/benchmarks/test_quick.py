"""The benchmarks still run. Their numbers are of interest on a quiet machine, not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def quick_result(name: str, output: Path) -> dict:
    """What `name`.py --quick leaves; its last line must be the path of it."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == str(output)
    result = json.loads(output.read_text(encoding="utf-8"))
    assert {"date", "machine", "versions", "settings", "summary"} <= result.keys()
    return result


def test_step_cost_times_every_variant_on_both_bases(tmp_path: Path) -> None:
    result = quick_result("step_cost", tmp_path / "result.json")
    measured = {(row["base"], row["variant"]) for row in result["summary"]}
    fused = {"plain", "step", "refresh", "mean", "full plain", "full step", "full refresh", "full mean"}
    assert measured == {(base, name) for base in ("float32", "4bit") for name in fused} | {("float32", "mezo")}
    assert all(times["wall_s"] > 0 for run in result["repetitions"].values() for rep in run for times in rep.values())


def test_attention_mask_finds_no_difference_without_it(tmp_path: Path) -> None:
    (row,) = quick_result("attention_mask", tmp_path / "result.json")["summary"]
    assert row["ratio"] > 0
    assert row["difference"] < 1e-6


@pytest.mark.usefixtures("shared_dir")
def test_alignment_scores_every_method_with_a_cosine(tmp_path: Path) -> None:
    result = quick_result("alignment", tmp_path / "result.json")
    methods = result["results"][0]["methods"]
    assert [method["method"] for method in methods] == ["mezo", "paper", "plain", "relative", "default"]
    assert all(-1 <= cosine <= 1 for method in methods for cosine in method["cosines"])
    assert 0 < methods[1]["share"] < methods[2]["share"] < 1  # rank 4 holds more of the gradient than rank 1


@pytest.mark.usefixtures("shared_dir")
def test_a_real_run_tells_its_held_out_losses(tmp_path: Path) -> None:
    result = quick_result("real_run", tmp_path / "result.json")
    assert [step for step, _ in result["runs"][0]["curve"]] == [0, 2]
    assert len(result["runs"][0]["losses"]) == 2


@pytest.mark.usefixtures("shared_dir")
def test_learning_compares_every_method_and_draws_a_picture(tmp_path: Path) -> None:
    result = quick_result("learning", tmp_path / "result.json")
    assert {row["method"] for row in result["summary"]} == {
        *(
            "preset",
            "mezo",
            "lozo",
            "paper",
            "zo-act",
            "default",
            "forward",
            "exact",
            "no-guide",
            "all-layers",
            "first-order",
        )
    }
    steps = {run["setup"]["method"]: len(run["curve"]) - 1 for run in result["runs"]}
    guided = {"default", "forward", "exact"}
    assert {steps.pop(method) for method in guided} == {1}  # the guide took the forward passes of the second
    assert set(steps.values()) == {2}
    assert (tmp_path / "result" / "stories260K-4bit-sst2.svg").read_text().startswith("<?xml")


@pytest.mark.usefixtures("shared_dir")
def test_numerics_sees_bfloat16_round_more_than_float32(tmp_path: Path) -> None:
    fine, coarse = quick_result("numerics", tmp_path / "result.json")["summary"]
    assert (fine["dtype"], coarse["dtype"]) == ("float32", "bfloat16")
    assert fine["best error"] < 0.1 * coarse["best error"]


@pytest.mark.usefixtures("shared_dir")
def test_grouping_leaves_less_padding_and_packing_never_more(tmp_path: Path) -> None:
    for row in quick_result("padding", tmp_path / "result.json")["summary"]:
        assert row["alone"] > row["group 4"] > row["group 16"] > row["group 64"] >= row["packed"] >= 0


@pytest.mark.slow
def test_a_large_file_tells_when_it_began_to_learn(tmp_path: Path) -> None:
    for row in quick_result("large_file", tmp_path / "result.json")["summary"]:
        assert 0 < row["data_s"] < row["first_step_s"]
        assert row["start_peak_over_plan"] <= row["peak_over_plan"] + 0.01
