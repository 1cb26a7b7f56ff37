from pathlib import Path

import psutil
import pytest

from agzo_edge.budget.detect import (
    board_profile,
    cache_folder,
    cgroup_memory,
    cpu_profile,
    detected_profile,
    gpu_profile,
    known_board,
    known_card,
    machine_profile,
)
from agzo_edge.budget.gpu import Gpu, board_name, gpu_from_csv, visible_gpu
from agzo_edge.budget.profile import load_profile
from agzo_edge.units import GIB, MIB

LAPTOP = Gpu("NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, "8.6")


def test_the_cpu_may_take_at_most_four_fifths_of_what_is_available() -> None:
    assert cpu_profile().budget_bytes <= 0.8 * psutil.virtual_memory().available * 1.05  # it moves a little


def test_without_a_visible_gpu_this_machine_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpu() is None
    assert detected_profile().kind == "cpu"
    assert machine_profile("auto").kind == "cpu"


@pytest.mark.parametrize(("home", "folder"), [("", "~/.cache/agzo-edge"), ("/mnt/cache", "/mnt/cache/agzo-edge")])
def test_an_empty_cache_home_is_none(home: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    assert cache_folder() == Path(folder).expanduser()


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


@pytest.mark.parametrize("text", ["", "\n", "No devices were found", "a, b, c, d, e", "NVIDIA X, [N/A], 3, 8.6, 580.1"])
def test_an_answer_of_nvidia_smi_that_names_no_gpu_is_none(text: str) -> None:
    assert gpu_from_csv(text) is None


def test_an_answer_of_nvidia_smi_is_read_in_mebibytes() -> None:
    answer = "Tesla T4, 15360, 15000, 7.5, 580.159.04\n"
    assert gpu_from_csv(answer) == Gpu("Tesla T4", 15360 * MIB, 15000 * MIB, "7.5", "580.159.04")


def memory_of_this_host(monkeypatch: pytest.MonkeyPatch, *, total: int) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(total=total, available=total // 2))


@pytest.mark.parametrize(
    ("name", "memory_mib", "profile"),
    [  # as owners of the boards report them; the firmware ends the name with a zero byte
        ("NVIDIA Orin Nano Developer Kit", 7620, "jetson-orin-nano-8gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15388, "jetson-orin-nx-16gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 30697, "jetson-agx-orin-32gb"),
    ],
)
def test_a_board_is_known_by_its_firmware_and_computes_in_the_hosts_memory(
    name: str, memory_mib: int, profile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory_of_this_host(monkeypatch, total=memory_mib * MIB)
    (tmp_path / "model").write_bytes(name.encode() + b"\0")
    known = known_board(board_name(tmp_path / "model"))
    assert known is not None
    assert known.name == profile
    here = board_profile(known)
    assert here.unified_memory
    assert known.context_overhead < here.budget_bytes <= 0.8 * memory_mib * MIB / 2


def test_a_board_with_other_memory_and_a_machine_without_a_name_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of_this_host(monkeypatch, total=4 * GIB)
    assert known_board("NVIDIA Orin Nano Developer Kit") is None
    assert board_name(Path("/no/such/file")) == ""
    memory_of_this_host(monkeypatch, total=8 * GIB)
    assert known_board("") is None


def test_a_host_of_8_gb_gets_the_settings_that_suit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_of_this_host(monkeypatch, total=8 * GIB)
    assert cpu_profile().settings == load_profile("cpu-8gb").settings


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
