from pathlib import Path

import psutil
import pytest

from agzo_edge.budget.detect import (
    Gpu,
    cgroup_memory,
    cpu_profile,
    detected_profile,
    gpu_from_csv,
    gpu_profile,
    known_card,
    machine_profile,
    visible_gpu,
)
from agzo_edge.units import GIB, MIB

LAPTOP = Gpu("NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, "8.6")


def test_the_cpu_may_take_at_most_four_fifths_of_what_is_available() -> None:
    assert cpu_profile().budget_bytes <= 0.8 * psutil.virtual_memory().available * 1.05  # it moves a little


def test_without_a_visible_gpu_this_machine_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpu() is None
    assert detected_profile().kind == "cpu"
    assert machine_profile("auto").kind == "cpu"


def test_any_other_name_is_a_shipped_profile() -> None:
    assert machine_profile("t4-16gb").name == "t4-16gb"


def test_a_known_card_brings_its_bandwidth_and_leaves_what_others_use() -> None:
    profile = gpu_profile(LAPTOP, host_bytes=8 * GIB)
    assert profile.memory_bandwidth_gb_s == 360.0
    assert profile.host_memory == 8 * GIB
    assert profile.budget_bytes < 11 * GIB


def test_a_card_of_the_same_name_with_other_memory_is_another_card() -> None:
    assert known_card(LAPTOP) is not None
    assert known_card(LAPTOP._replace(memory_bytes=8 * GIB)) is None


def test_an_unknown_card_has_no_bandwidth_rather_than_a_guess() -> None:
    profile = gpu_profile(Gpu("NVIDIA New", 16 * GIB, 16 * GIB, "12.0"), host_bytes=GIB)
    assert profile.memory_bandwidth_gb_s is None
    assert profile.bf16


def test_a_full_card_still_makes_a_profile() -> None:
    assert gpu_profile(LAPTOP._replace(free_bytes=0), host_bytes=GIB).budget_bytes > 0


@pytest.mark.parametrize("text", ["", "\n", "No devices were found", "a, b, c, d", "NVIDIA X, [N/A], 3, 8.6"])
def test_an_answer_of_nvidia_smi_that_names_no_gpu_is_none(text: str) -> None:
    assert gpu_from_csv(text) is None


def test_an_answer_of_nvidia_smi_is_read_in_mebibytes() -> None:
    assert gpu_from_csv("Tesla T4, 15360, 15000, 7.5\n") == Gpu("Tesla T4", 15360 * MIB, 15000 * MIB, "7.5")


def test_every_enclosing_control_group_bounds_the_memory(tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "job" / "memory.max").write_text("2000\n")
    (tmp_path / "job" / "memory.current").write_text("500\n")
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    assert cgroup_memory(tmp_path, own) == [(2000, 500)]


def test_version_1_without_a_limit_is_none(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert cgroup_memory(tmp_path, tmp_path / "missing") == []
