import json
import platform
import shutil
from pathlib import Path

import pytest

from agzo_edge.budget.detect import cpu_profile, gpu_profile
from agzo_edge.budget.gpu import Gpu
from agzo_edge.budget.profile import load_profile
from agzo_edge.cli import main
from agzo_edge.serve.doctor import examination, machine_advice, package_advice, room_advice
from agzo_edge.units import GIB, MIB

CPU = {"kind": "cpu", "threads": 1}
CUDA = {"kind": "cuda", "name": "NVIDIA New"}
INSTALLED = dict.fromkeys(examination()["packages"] | examination()["optional"], "1.0")


def test_the_doctor_tells_what_is_detected_free_and_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json"])
    assert stopped.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["detected"]["profile"].startswith("auto")
    assert 0 < found["detected"]["budget_bytes"] < found["detected"]["memory_bytes"]
    assert found["detected"]["budget_bytes"] <= found["free"]["host_bytes"] or found["device"]["kind"] == "cuda"
    assert found["packages"]["torch"]


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    assert list(package_advice(INSTALLED, with_cuda=True)) == []
    assert list(package_advice(INSTALLED | {"peft": None}, with_cuda=False)) == ["peft is missing: pip install peft"]
    without_nvml = INSTALLED | {"nvidia-ml-py": None}
    assert list(package_advice(without_nvml, with_cuda=False)) == []
    assert "pip install nvidia-ml-py" in next(package_advice(without_nvml, with_cuda=True))


def test_a_card_that_no_profile_knows_is_said_to_be_estimated() -> None:
    new = gpu_profile(Gpu("NVIDIA New", 16 * GIB, 16 * GIB, "12.0"), host_bytes=GIB)
    known = gpu_profile(Gpu("NVIDIA GeForce RTX 3060", 12 * GIB, 12 * GIB, "8.6"), host_bytes=GIB)
    assert "estimated" in next(machine_advice(new, CUDA, board=""))
    assert list(machine_advice(known, CUDA, board="")) == []


def test_a_torch_without_cuda_beside_a_gpu_is_told_which_build_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = load_profile("jetson-orin-nano-8gb")
    assert "JetPack" in next(machine_advice(board, CPU, board="NVIDIA Orin Nano Developer Kit"))
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("nvidia-smi")
    assert "CUDA build" in next(machine_advice(cpu_profile(), CPU, board=""))
    monkeypatch.setenv("PATH", "")
    assert list(machine_advice(cpu_profile(), CPU, board="")) == []
    assert "OMP_NUM_THREADS=1" in next(machine_advice(cpu_profile(), CPU | {"threads": 8}, board=""))


def test_a_gpu_whose_memory_nobody_tells_needs_a_profile() -> None:
    assert "--profile FILE.toml" in next(machine_advice(cpu_profile(), CUDA, board=""))


def test_wsl_is_warned_of_memory_that_moves_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    assert "WSL" in next(machine_advice(load_profile("rtx-3060-12gb"), CUDA, board=""))


def test_little_room_is_said_with_where_to_go() -> None:
    free = {"disk_bytes": 10 * GIB, "model_cache_bytes": 10 * GIB, "model_cache_folder": "/home/a/hub"}
    plenty = list(room_advice(free))
    assert list(room_advice(free | {"disk_bytes": 5 * MIB}))[len(plenty) :] == [
        "only 5.0 MiB are free here: give --output-dir on another disk"
    ]
    assert "HF_HOME" in list(room_advice(free | {"model_cache_bytes": 5 * MIB}))[-1]
