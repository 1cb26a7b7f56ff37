"""Memory as the machine sees it: peaks, limits, and what happens at them."""

import subprocess
import sys

import psutil
import pytest
import torch
from helpers import tiny_checkpoint

from agzo_edge.budget.facts import model_facts
from agzo_edge.budget.plan import memory_plan
from agzo_edge.budget.profile import load_profile
from agzo_edge.config import config_from
from agzo_edge.errors import BudgetBrokenError, BudgetError
from agzo_edge.model import memory
from agzo_edge.model.load import refused_as_model
from agzo_edge.model.memory import (
    PeakMeter,
    anonymous_bytes,
    bytes_outside_torch,
    capped,
    expect_outside_torch,
    free_bytes,
    give_back,
    is_out_of_memory,
    refused_as_budget,
    total_bytes,
)
from agzo_edge.units import GIB, MIB

CPU = torch.device("cpu")


def test_the_meter_sees_memory_come_and_keeps_the_peak() -> None:
    meter = PeakMeter(CPU)
    before = meter.read()
    block = torch.ones(64 * MIB // 4)
    with_block = meter.read()
    assert with_block - before > 60 * MIB
    del block
    assert meter.read() < with_block - 60 * MIB
    assert meter.peak_bytes == pytest.approx(with_block, abs=2 * MIB)
    meter.restart()
    assert meter.peak_bytes < with_block - 60 * MIB
    assert anonymous_bytes() > MIB


def test_the_meter_sees_a_peak_between_two_readings() -> None:
    meter = PeakMeter(CPU)
    before = meter.read()
    block = torch.ones(100 * MIB // 4)
    del block
    assert meter.read() < before + 10 * MIB
    assert meter.peak_bytes == pytest.approx(before + 100 * MIB, abs=4 * MIB)


def test_under_a_cap_the_allocation_that_would_pass_it_fails_and_smaller_ones_do_not() -> None:
    limit = anonymous_bytes() + 100 * MIB
    with capped(CPU, limit):
        torch.ones(60 * MIB // 4)
        with pytest.raises(BudgetBrokenError, match="allocate"), capped(CPU, limit):
            torch.ones(200 * MIB // 4)
    assert torch.ones(200 * MIB // 4).sum() == 200 * MIB // 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data")
def test_a_cap_never_lifts_a_limit_that_was_there() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8 * GIB, before[1]))
    try:
        with capped(CPU, 64 * GIB):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= 8 * GIB
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 8 * GIB
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_other_errors_pass_a_cap_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), capped(CPU, 64 * GIB):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_what_is_free_is_no_more_than_there_is() -> None:
    give_back(CPU)
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


def test_of_a_container_s_host_there_is_what_the_container_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agzo_edge.budget.detect.cgroup_memory", lambda: [(GIB, 0)])
    assert total_bytes(CPU) == GIB


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_what_a_failed_allocation_raises_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_allocation_that_fails_while_loading_is_a_refusal_with_the_numbers() -> None:
    plan = memory_plan(model_facts(tiny_checkpoint("llama")), config_from({"ram_limit": "2GiB"}), load_profile("cpu"))
    with (
        pytest.raises(BudgetError, match=r"within 2\.00 GiB, of which .* were planned.*Lower --vram-limit"),
        refused_as_budget(plan),
        refused_as_model("a model", "cannot be loaded"),
    ):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), refused_as_budget(plan):
        torch.ones(2, 3) @ torch.ones(2, 3)


HOLES = """
import torch
from agzo_edge.model.memory import anonymous_bytes, return_what_is_freed
return_what_is_freed()
pairs = [(torch.ones(2**19), torch.ones(2**10)) for _ in range(100)]  # of 2 MiB and of 4 KiB, side by side
full = anonymous_bytes()
small = [pair[1] for pair in pairs]
del pairs
print(full - anonymous_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_tensors_that_are_freed_between_others_go_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 190 * MIB


def test_what_nvml_does_not_tell_of_a_card_is_what_the_plan_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 7)
    told = {"used": 0}
    monkeypatch.setattr(memory, "_nvml_used", lambda _device: told["used"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 3 * MIB)
    assert bytes_outside_torch(card) == 0
    expect_outside_torch(card, 450 * MIB)
    assert bytes_outside_torch(card) == 450 * MIB
    told["used"] = 903 * MIB
    assert bytes_outside_torch(card) == 900 * MIB
