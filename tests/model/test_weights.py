"""Stored weights are only ever read."""

from functools import partial

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from helpers import run_config, tiny_checkpoint, tiny_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from agzo_edge.errors import ModelError
from agzo_edge.model import four_bit
from agzo_edge.model.four_bit import FourBitWeight
from agzo_edge.model.linear import FrozenLinear
from agzo_edge.model.load import load_model
from agzo_edge.model.weights import (
    DenseWeight,
    EightBitWeight,
    HeldWeight,
    base_weight_of,
    is_linear,
    quantized,
)
from agzo_edge.model.workspace import Workspace
from agzo_edge.numerics.noise import rounding_bits

NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"load_in_4bit": True}, 0.11),
        ({"load_in_4bit": True, "quant_type": "fp4"}, 0.16),
        ({"load_in_4bit": True, "double_quant": True}, 0.11),
        ({"load_in_8bit": True}, 0.01),
    ],
)
# bitsandbytes' CPU kernel scales blocks that straddle rows wrongly at widths such as 48, 96 and 160, not at 68
@pytest.mark.parametrize("sizes", [(64, 96), (48, 160), (68, 70), (100, 102)])
def test_every_quantized_weight_is_near_the_original(
    sizes: tuple[int, int], settings: dict[str, object], limit: float
) -> None:
    source = tiny_checkpoint("llama", hidden_size=sizes[0], intermediate_size=sizes[1])
    originals = load_file(f"{source}/model.safetensors")
    for name, layer in load_model(source, run_config(**settings)).layers.items():
        original = originals[f"{name}.weight"]
        assert layer.base.shape == tuple(original.shape)
        error = float((layer.base.dense() - original).norm() / original.norm())
        assert 1e-4 < error < limit, name


@pytest.mark.parametrize("width", ["load_in_4bit", "load_in_8bit"])
def test_a_weight_that_is_quantized_already_goes_to_the_device_whole(width: str) -> None:
    config = run_config(**{width: True})
    weight = tiny_model("llama", **{width: True}).layers[NAME].base
    device = torch.device("meta")  # in a GPU's place
    moved = quantized(weight, config, device=device, dtype=torch.float32, workspace=Workspace())
    assert {tensor.device for _, tensor in moved.stored()} == {device}


def test_a_four_bit_weight_dequantizes_as_bitsandbytes_says_and_never_changes() -> None:
    weight = tiny_model("llama", load_in_4bit=True).layers[NAME].base
    assert isinstance(weight, FourBitWeight)
    packed = weight.packed.clone()
    first = weight.dense()
    assert torch.equal(first, dequantize_4bit(weight.packed, weight.state))
    first.zero_()  # a caller may overwrite what it was given
    assert weight.dense().any()
    assert torch.equal(weight.packed, packed)
    assert dict(weight.stored()).keys() == {"packed", "absmax"}


FOUR_BIT = [{}, {"quant_type": "fp4"}, {"double_quant": True}]


def four_bit_layer(device: str, **settings: object) -> FrozenLinear:
    """A layer of 192 outputs and 128 inputs with a bias."""
    values = torch.randn(192, 128, generator=torch.Generator().manual_seed(0)).to(device)
    config, dtype = run_config(load_in_4bit=True, **settings), torch.float32
    weight = quantized(DenseWeight(values), config, device=torch.device(device), dtype=dtype, workspace=Workspace())
    return FrozenLinear(weight, torch.randn(192, generator=torch.Generator().manual_seed(1)).to(device))


@pytest.mark.parametrize("settings", FOUR_BIT)
@pytest.mark.parametrize("is_beside", [False, True])
def test_the_fused_product_is_that_of_the_dense_weight(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], is_beside: bool
) -> None:
    layer, x = four_bit_layer("cpu", **settings), torch.randn(3, 1, 128)
    beside = torch.randn(3, 1, 192) if is_beside else None
    expected = layer.product(x, layer.bias, beside=None if beside is None else beside.clone())
    monkeypatch.setattr(FourBitWeight, "fused_product", lambda weight, x, bias: four_bit._fused(x, weight, bias))
    assert_close(layer.product(x, layer.bias, beside=beside), expected, rtol=1e-5, atol=1e-4)


def test_a_product_is_fused_for_few_rows_on_a_gpu_alone() -> None:
    layer = four_bit_layer("cpu")
    assert isinstance(layer.base, FourBitWeight)
    assert layer.base.fused_product(torch.randn(1, 128), None) is None


@pytest.mark.parametrize("kind", [{"quant_type": "nf4"}, {"quant_type": "fp4"}])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_kernel_that_is_wrong_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, str], is_nested: bool
) -> None:
    tried = partial(
        four_bit._fuses_rightly.__wrapped__, torch.device("cpu"), torch.float32, **kind, is_nested=is_nested
    )
    assert tried()
    fused = four_bit._fused
    for wrong in (
        lambda x, weight, bias: fused(x.flip(0), weight, bias),
        lambda x, weight, _bias: fused(x, weight, None),
        lambda x, weight, bias: fused(x, weight, bias).roll(1, -1),
        lambda x, weight, bias: x @ weight.dense().mT.flip(0) + bias,
    ):
        monkeypatch.setattr(four_bit, "_fused", wrong)
        assert not tried()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", FOUR_BIT)
def test_a_few_rows_on_a_gpu_are_multiplied_without_a_dense_weight(settings: dict[str, object]) -> None:
    layer = four_bit_layer("cuda", **settings)
    assert isinstance(layer.base, FourBitWeight)
    x = torch.randn(four_bit.FEW_ROWS + 1, 128, device="cuda")
    assert layer.base.fused_product(x, layer.bias) is None
    found = layer.base.fused_product(x[:-1], layer.bias)
    assert found is not None
    assert_close(found, layer(x)[:-1], rtol=1e-3, atol=1e-2)


def test_an_eight_bit_weight_is_its_integers_times_the_rows_scale() -> None:
    rows = torch.tensor([[127, -127, 0], [64, 1, -1]], dtype=torch.int8)
    weight = EightBitWeight(rows, torch.tensor([2.0, 0.127]), dtype=torch.float32, workspace=Workspace())
    assert_close(weight.dense(), torch.tensor([[2.0, -2.0, 0.0], [0.064, 0.001, -0.001]]))


def test_conv1d_weights_are_read_transposed_and_without_a_copy() -> None:
    model = tiny_model("gpt2")
    weight = model.layers["transformer.h.0.mlp.c_fc"].base
    assert isinstance(weight, DenseWeight)
    assert weight.shape == (256, 64)
    assert weight.dense().data_ptr() == weight.dense().data_ptr()


def test_layers_of_an_unknown_kind_are_refused_by_name() -> None:
    assert not is_linear(nn.Embedding(3, 3))
    with pytest.raises(ModelError, match=r"model\.x: a Bilinear is no linear layer"):
        base_weight_of(nn.Bilinear(2, 2, 2), name="model.x", dtype=torch.float32)


def test_quantized_layers_without_their_scales_are_refused_by_name() -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    with pytest.raises(ModelError, match=r"model\.x: the 4-bit layer carries no quantization state"):
        base_weight_of(Linear4bit(64, 64), name="model.x", dtype=torch.float32)
    with pytest.raises(ModelError, match=r"model\.x: the 8-bit layer carries no row scales"):
        base_weight_of(
            Linear8bitLt(64, 64, has_fp16_weights=False), name="model.x", dtype=torch.float32, workspace=Workspace()
        )


def test_small_changes_of_a_held_bfloat16_weight_add_up_and_the_stored_one_stays() -> None:
    origin = tiny_model("llama", load_in_4bit=True, dtype="bfloat16").layers[NAME].base
    stored = [tensor.clone() for _, tensor in origin.stored()]
    held = HeldWeight(origin, dtype=torch.bfloat16)
    assert not held.change().any()
    for step in range(200):  # each far below half a unit in the last place of most weights
        held.add_(torch.full(held.shape, 1e-4), partial(rounding_bits, held.shape, seed=0, step=step, layer=0))
    assert held.dense().dtype is torch.bfloat16
    assert float(held.change().mean()) == pytest.approx(200 * 1e-4, rel=0.02)
    assert all(torch.equal(a, b) for a, (_, b) in zip(stored, held.stored(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_held_weights_of_other_dtypes_are_kept_in_float32(dtype: torch.dtype) -> None:
    held = HeldWeight(DenseWeight(torch.ones(4, 3, dtype=dtype)), dtype=dtype)
    held.add_(torch.full((4, 3), 1e-6), lambda: pytest.fail("asked for random bits"))
    assert held.dense().dtype is dtype
    assert_close(held.change(), torch.full((4, 3), 1e-6), rtol=0.1, atol=0)
