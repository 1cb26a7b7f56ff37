"""Cards, drivers and packages that are not here, as plain values."""

from dataclasses import replace

import pytest

from agzo_edge.budget.gpu_setup import GpuSetup, has_kernels, setup_faults, setup_notes

SOUND = GpuSetup(
    card="NVIDIA GeForce RTX 4070",
    driver="580.159.04",
    torch_cuda="13.0",
    capability=(8, 9),
    compiled_for=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
    bitsandbytes_has_cuda=True,
)
TURING = replace(SOUND, card="NVIDIA GeForce GTX 1650", capability=(7, 5))


def test_a_sound_setup_and_one_without_a_card_have_no_faults() -> None:
    assert list(setup_faults(SOUND)) == []
    assert list(setup_faults(GpuSetup())) == []
    assert list(setup_notes(SOUND, dtype="bfloat16")) == []


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (replace(SOUND, torch_cuda=None, capability=None), "this torch has no CUDA: install torch's CUDA build"),
        (replace(SOUND, driver="470.82.01", capability=None), "is 470.82.01, and torch's CUDA 13.0 needs 580 or newer"),
        (replace(SOUND, driver="535.54", torch_cuda="12.8", capability=None), "cannot use it: restart"),
        (replace(SOUND, driver=None, capability=None), "version unknown"),
        (replace(SOUND, torch_cuda="14.0", capability=None), "torch's CUDA 14.0 cannot use it"),
        (replace(SOUND, card="NVIDIA GeForce GTX 1080", capability=(6, 1)), "has compute capability 6.1"),
        (replace(SOUND, bitsandbytes_has_cuda=False), "bitsandbytes has no library for CUDA 13.0"),
    ],
)
def test_each_fault_is_the_only_one_told_and_says_what_to_do(setup: GpuSetup, words: str) -> None:
    (fault,) = setup_faults(setup)
    assert words in fault
    assert ": " in fault


def test_a_run_that_quantizes_nothing_does_without_bitsandbytes_kernels() -> None:
    assert list(setup_faults(replace(SOUND, bitsandbytes_has_cuda=False), quantized=False)) == []


def test_a_card_without_bfloat16_says_what_is_computed_in_what() -> None:
    (note,) = setup_notes(TURING, dtype="float16")
    assert "compute capability 7.5" in note
    assert "losses, bases and what is learned are in float32" in note
    assert "emulates bfloat16" in next(setup_notes(TURING, dtype="bfloat16"))
    assert list(setup_notes(TURING, dtype="float32")) == []


def test_a_card_on_which_our_kernels_do_not_work_says_why() -> None:
    (note,) = setup_notes(replace(SOUND, kernel_fault="RuntimeError: Failed to find C compiler"), dtype="bfloat16")
    assert "without Triton's kernels: RuntimeError: Failed to find C compiler" in note


@pytest.mark.parametrize(
    ("capability", "compiled_for", "runs"),
    [
        ((8, 9), ("sm_80",), True),  # machine code runs on later minor versions
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("sm_80", "compute_80"), True),  # intermediate code is translated for any later card
        ((7, 5), ("compute_80",), False),
        ((12, 0), ("sm_90a", "sm_120"), True),
        ((8, 6), ("gfx90a",), False),
    ],
)
def test_code_runs_where_nvidia_says_it_does(
    capability: tuple[int, int], compiled_for: tuple[str, ...], runs: bool
) -> None:
    assert has_kernels(capability, compiled_for) is runs
