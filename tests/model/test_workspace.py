"""One buffer for all quantized weights, of the largest one's size."""

import torch
from helpers import tiny_model

from agzo_edge.model.workspace import Workspace

CPU = torch.device("cpu")


def test_the_buffer_is_made_once_for_the_largest_weight_that_is_expected() -> None:
    workspace = Workspace()
    workspace.expect((8, 4), torch.float32)
    workspace.expect((3, 5), torch.bfloat16)
    small = workspace.tensor((3, 5), dtype=torch.bfloat16, device=CPU)
    large = workspace.tensor((8, 4), dtype=torch.float32, device=CPU)
    assert (small.shape, small.dtype, large.shape, large.dtype) == ((3, 5), torch.bfloat16, (8, 4), torch.float32)
    assert small.data_ptr() == large.data_ptr()
    assert large.untyped_storage().nbytes() == 8 * 4 * 4


def test_a_weight_that_nobody_announced_still_finds_room() -> None:
    workspace = Workspace()
    workspace.tensor((2, 2), dtype=torch.float32, device=CPU)
    assert workspace.tensor((20, 20), dtype=torch.float32, device=CPU).fill_(1.0).sum() == 400


def test_all_quantized_layers_of_a_model_are_dequantized_into_the_same_memory() -> None:
    for settings in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        layers = tiny_model(**settings).layers.values()
        assert len({layer.base.dense().data_ptr() for layer in layers}) == 1
