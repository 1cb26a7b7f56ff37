"""A safetensors file written one tensor at a time."""

import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from agzo_edge.errors import ModelError
from agzo_edge.serve.tensor_file import LazyTensor, lazy_tensors, stored_as, write_tensor_file

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def held(name: str, values: Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(values.shape), values.dtype, lambda: values)


@settings(max_examples=30)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6)
)
def test_any_tensors_are_read_back_bit_for_bit_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    tensors = {
        f"größe.{index}": (torch.arange(torch.Size(shape).numel()) % 3).reshape(shape).to(dtype)
        for index, (dtype, shape) in enumerate(kinds)
    }
    write_tensor_file(path, [held(name, values) for name, values in tensors.items()])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, values in tensors.items():
        assert loaded[name].dtype == values.dtype
        assert torch.equal(loaded[name], values)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def fresh() -> Tensor:
        assert not any(tensor() is not None for tensor in alive)
        values = torch.ones(8)
        alive.append(weakref.ref(values))
        return values

    write_tensor_file(tmp_path / "a.safetensors", [LazyTensor(str(i), (8,), torch.float32, fresh) for i in range(5)])
    assert len(alive) == 5


def test_a_file_read_lazily_and_written_again_is_the_same(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4).T.contiguous(),
        "a": torch.tensor(2.0),
        "c": torch.ones(2, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    write_tensor_file(tmp_path / "b.safetensors", lazy_tensors(tmp_path / "a.safetensors"))
    assert load_file(tmp_path / "b.safetensors").keys() == tensors.keys()
    for name, values in load_file(tmp_path / "b.safetensors").items():
        assert torch.equal(values, tensors[name])


def test_only_floats_change_their_type() -> None:
    assert stored_as(held("mask", torch.ones(2, dtype=torch.bool)), torch.float16).dtype == torch.bool
    assert torch.equal(stored_as(held("x", torch.ones(2)), torch.float16).read(), torch.ones(2).half())
    with pytest.raises(ModelError, match="x: passes the range"):
        stored_as(held("x", torch.full((2,), 1e6)), torch.float16).read()
