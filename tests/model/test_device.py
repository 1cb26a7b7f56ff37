"""The one place that knows the machine."""

import pytest
import torch

from agzo_edge.errors import ConfigError
from agzo_edge.model.device import PeakMeter, anonymous_bytes, chosen_device, chosen_dtype
from agzo_edge.units import MIB

CPU = torch.device("cpu")


def test_names_mean_devices_and_dtypes() -> None:
    assert chosen_device("cpu") == CPU
    assert chosen_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert chosen_dtype("auto", CPU) is torch.float32
    assert chosen_dtype("bfloat16", CPU) is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_on_a_machine_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cpu"):
        chosen_device("cuda")


def test_the_meter_sees_memory_come_and_keeps_the_peak() -> None:
    meter = PeakMeter(CPU)
    before = meter.read()
    block = torch.ones(64 * MIB // 4)
    with_block = meter.read()
    assert with_block - before > 60 * MIB
    del block
    assert meter.read() < with_block - 60 * MIB
    assert meter.peak_bytes == with_block
    meter.restart()
    assert meter.peak_bytes < with_block - 60 * MIB
    assert anonymous_bytes() > MIB
