"""The one place that knows the machine."""

import pytest
import torch

from agzo_edge.errors import ConfigError
from agzo_edge.model.device import THREADS, chosen_device, chosen_dtype, sent, use_threads

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


def test_a_large_model_has_torchs_own_threads_again_after_a_small_one() -> None:
    before = torch.get_num_threads()
    try:
        use_threads(0, n_parameters=10)
        assert torch.get_num_threads() == 1
        use_threads(0, n_parameters=10**9)
        assert torch.get_num_threads() == THREADS
        use_threads(3, n_parameters=10)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_tensor_that_is_sent_arrives_unchanged() -> None:
    tensor = torch.arange(5)
    assert sent(tensor, "cpu") is tensor
    assert sent(tensor, torch.device("cpu")) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nobody_waits_for_a_tensor_that_is_sent_to_a_gpu() -> None:
    tensor = torch.arange(100_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        arrived = sent(tensor, "cuda")
        assert sent(arrived, "cuda") is arrived
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(arrived.cpu(), tensor)
