"""Every section of the GPU benchmark runs; its numbers are of interest on a GPU, not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_section_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    sections = gpu_sections(tmp_path, "cpu")
    exact = next(row for row in sections["correctness"] if row["dtype"] == "float32")
    assert exact["same_noise"]
    assert exact["update_cosine"] == pytest.approx(1.0)
    errors = {(row["dtype"], row["mu"]): row["relative_error"] for row in sections["numerics"]}
    assert errors["float32", 0.01] < errors["bfloat16", 0.01] < errors["bfloat16", 0.0001]
    assert {row["method"] for row in sections["steps"]} == {
        *("plain forward of 2B rows", "step", "step with refresh", "mezo, dense"),
        *("paper's agzo in place, dense", "qlora"),
    }
    assert {row["method"] for row in sections["contexts"]} == {"ours", "qlora"}
    assert all(row["peak_bytes"] <= 2**30 for row in sections["limits"])
    assert {row["offload"] for row in sections["streaming"] if "ms" in row} == {"none", "layers"}
    missing = {row.get("part", row.get("model")) for rows in sections.values() for row in rows if "not_run" in row}
    assert missing == {"branch, kernel", "llama-3.1-70b"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_section_of_the_gpu_benchmark_runs_on_a_gpu(tmp_path: Path) -> None:
    sections = gpu_sections(tmp_path, "cuda")
    assert all(row["same_noise"] and row["update_cosine"] > 0.95 for row in sections["correctness"])
    assert "branch, kernel" in {row["part"] for row in sections["kernels"] if "ms" in row}


def gpu_sections(folder: Path, device: str) -> dict[str, list[dict]]:
    """The rows of each section of gpu.py --small."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", device, "--small", "--output", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert answer.returncode == 0, answer.stderr
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
    assert all(result["finished"] for result in results.values())
    return {name: result["rows"] for name, result in results.items()}
