from pathlib import Path

import pytest
import torch

from agzo_edge.budget.detect import cpu_profile
from agzo_edge.budget.profile import load_profile
from agzo_edge.config import config_from
from agzo_edge.errors import ConfigError
from agzo_edge.model.setup import gpu_setup, on_planned_device, require_usable_device

NVIDIA_SMI = "#!/bin/sh\necho 'NVIDIA GeForce GTX 1650, 4096, 4000, 7.5, 390.10'\n"


def test_a_run_on_the_cpu_is_asked_nothing_about_a_gpu() -> None:
    assert require_usable_device(config_from({}), cpu_profile()) == ()
    assert require_usable_device(config_from({"device": "cpu"}), load_profile("gtx-1650-4gb")) == ()


@pytest.mark.parametrize(
    ("vectors", "dtype", "told"), [("AVX2", "bfloat16", 1), ("AVX2", "auto", 0), ("AVX512", "bfloat16", 0)]
)
def test_16_bit_on_a_cpu_without_instructions_for_it_is_told(
    vectors: str, dtype: str, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    notes = require_usable_device(config_from({"device": "cpu", "dtype": dtype}), cpu_profile())
    assert len(notes) == told
    assert all("--dtype float32" in note for note in notes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's card")
def test_a_card_that_torch_cannot_use_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_setup().driver == "390.10"
    expected = "390.10" if torch.version.cuda else "install torch's CUDA build"
    with pytest.raises(ConfigError, match=f"--device cpu computes without it(.|\n)*{expected}"):
        require_usable_device(config_from({}), load_profile("gtx-1650-4gb"))


@pytest.mark.parametrize(
    ("profile", "settings", "device"),
    [
        ("cpu", {}, "cpu"),
        ("rtx-3060-12gb", {}, "cuda"),
        ("rtx-3060-12gb", {"device": "cuda"}, "cuda"),
        ("rtx-3060-12gb", {"device": "cpu"}, "cpu"),
    ],
)
def test_a_run_is_loaded_on_the_device_that_its_plan_is_for(
    profile: str, settings: dict[str, str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = config_from(settings, {"profile": profile})
    assert on_planned_device(config, load_profile(profile)).device == device


def test_a_card_whose_memory_nobody_tells_is_not_taken_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    with pytest.raises(ConfigError, match=r"torch sees a card, and no driver tells its memory.*--device cpu"):
        on_planned_device(config_from({}), cpu_profile())
    assert on_planned_device(config_from({"device": "cpu"}), cpu_profile()).device == "cpu"


def test_a_gpu_s_plan_is_not_carried_out_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"'rtx-3060-12gb' is a GPU's.*--profile auto"):
        on_planned_device(config_from({}), load_profile("rtx-3060-12gb"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_machines_card_can_be_used() -> None:
    setup = gpu_setup()
    assert setup.capability == torch.cuda.get_device_capability()
    assert setup.bitsandbytes_has_cuda
