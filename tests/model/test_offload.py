"""Weights that wait outside the device: the numbers stay, bit for bit, and the memory does not."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, model_logits, run_config, save_tiny, tiny_batch, tiny_checkpoint, tiny_model
from transformers import LlamaConfig

from agzo_edge.errors import ModelError
from agzo_edge.model.load import load_model
from agzo_edge.model.memory import anonymous_bytes
from agzo_edge.model.offload import MappedFile, settle
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.model.stream import HostBlocks, HostHead, block_of, embed_on_host, pinned_bytes
from agzo_edge.model.weights import rehoused
from agzo_edge.units import MIB

WIDTHS = {
    "float32": {},
    "nf4": {"load_in_4bit": True},
    "nested": {"load_in_4bit": True, "double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("offload", ["embeddings", "layers"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_a_model_whose_weights_wait_in_a_file_gives_the_same_bytes(family: str, width: str, offload: str) -> None:
    usual, outside = tiny_model(family, **WIDTHS[width]), tiny_model(family, **WIDTHS[width], offload=offload)
    assert torch.equal(model_logits(outside, tiny_batch(3)), model_logits(usual, tiny_batch(3)))
    assert outside.base_sha256() == usual.base_sha256()


@pytest.mark.parametrize("width", WIDTHS)
def test_weights_go_out_and_come_back_while_a_model_is_in_use(width: str) -> None:
    model, batch = tiny_model("gpt2", **WIDTHS[width]), tiny_batch(3)
    expected = model_logits(model, batch)
    for offload in ("layers", "embeddings", "layers", "none", "embeddings"):
        settle(model, run_config(offload=offload))
        assert torch.equal(model_logits(model, batch), expected)


def test_tied_embeddings_stay_one_tensor_wherever_they_are() -> None:
    model = load_model(tiny_checkpoint("qwen3"), run_config())
    for offload in ("embeddings", "none", "layers"):
        settle(model, run_config(offload=offload))
        embeddings = model.network.get_input_embeddings().weight
        assert model.head.base.dense().data_ptr() == embeddings.data_ptr()


def test_weights_that_learning_writes_to_stay_in_memory() -> None:
    model = tiny_model("llama", load_in_4bit=True, target="dequantized", offload="layers")
    held = {id(branch.held) for branch in model.branches}
    assert held
    assert {id(layer.base) for layer in model.layers.values()} == held


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 MiB in float32, so that its weights can be told from all else."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=4000, **shape)
    return save_tiny(config, tmp_path_factory.mktemp("larger"))


MEASURE = """
import sys, torch
from agzo_edge.config import config_from
from agzo_edge.model.memory import anonymous_bytes
from agzo_edge.model.load import load_model
import transformers, bitsandbytes.functional
settings = {"device": "cpu", "offload": sys.argv[2], "load_in_4bit": False}
load_model(sys.argv[3], config_from(settings))  # what loading itself leaves, once
before = anonymous_bytes()
model = load_model(sys.argv[1], config_from(settings))
for layer in model.frozen_layers.values():
    layer.base.dense().sum()
print(anonymous_bytes() - before)
"""


@pytest.mark.parametrize(("offload", "share"), [("none", (0.95, 1.2)), ("layers", (-0.1, 0.1))])
def test_layers_in_a_file_take_no_anonymous_memory(offload: str, share: tuple[float, float], larger: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(larger), offload, tiny_checkpoint("llama")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    weight_bytes = (larger / "model.safetensors").stat().st_size
    assert share[0] < int(answer.stdout) / weight_bytes < share[1]


def test_memory_comes_back_when_a_running_model_moves_its_layers_out(larger: Path) -> None:
    model = load_model(str(larger), run_config())
    before = anonymous_bytes()
    settle(model, run_config(offload="layers"))
    gc.collect()
    assert before - anonymous_bytes() > 50 * MIB


def test_a_mapped_file_holds_what_was_put_in_it_in_its_own_layout() -> None:
    file = MappedFile()
    wide = torch.randn(5, 7)
    for tensor in (wide, wide.mT, wide.bfloat16(), torch.arange(3, dtype=torch.uint8), torch.ones(1, 1)):
        kept = file.keep(tensor)
        assert torch.equal(kept, tensor)
        assert (kept.stride(), kept.dtype) == (tensor.stride(), tensor.dtype)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"file/agzo-edge: no file for what waits outside memory"):
        MappedFile()


def streamed(model: EdgeModel) -> EdgeModel:
    """The model with its layers streamed as beside a GPU, the buffers being on the CPU as well."""
    layers = {name: layer for name, layer in model.frozen_layers.items() if layer is not model.head}
    HostBlocks(layers, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_layers_give_the_same_bytes(family: str, width: str) -> None:
    expected = model_logits(tiny_model(family, **WIDTHS[width]), tiny_batch(3))
    model = streamed(tiny_model(family, **WIDTHS[width]))
    for _ in range(2):  # the second pass begins with a block that was copied ahead in the first
        assert torch.equal(model_logits(model, tiny_batch(3)), expected)


def test_streamed_layers_may_be_called_out_of_order_and_again() -> None:
    plain, model = tiny_model("llama", load_in_4bit=True), streamed(tiny_model("llama", load_in_4bit=True))
    expected = [layer.base.dense().clone() for layer in plain.frozen_layers.values()]
    got = list(model.frozen_layers.values())
    for i in (3, 9, 3, 0, 13, 8, 0):
        assert torch.equal(got[i].base.dense(), expected[i])


@pytest.mark.parametrize("width", WIDTHS)
def test_streamed_layers_come_back_whole(width: str) -> None:
    model = streamed(tiny_model("llama", **WIDTHS[width]))
    hash_before = tiny_model("llama", **WIDTHS[width]).base_sha256()
    assert model.base_sha256() == hash_before
    for layer in model.frozen_layers.values():
        layer.base = rehoused(layer.base, torch.clone)
    assert model.base_sha256() == hash_before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_that_was_freed_can_be_pinned_again() -> None:
    for _ in range(3):  # the allocator hands out the same addresses
        buffer = pinned_bytes(8 * MIB)
        assert buffer.is_pinned()
        assert not buffer.cuda(non_blocking=True).isnan().any()
        del buffer


def test_memory_that_cannot_be_pinned_serves_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Refusing:
        @staticmethod
        def cudaHostRegister(*arguments: int) -> int:  # CUDA's name
            asked.append(arguments)
            return 2

    def told_once_more(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    monkeypatch.setattr(torch, "zeros", told_once_more)
    buffer = pinned_bytes(MIB)
    assert len(asked) == 1
    assert buffer.numel() == MIB


def test_a_block_is_the_layers_with_its_number() -> None:
    names = ["model.layers.3.self_attn.q_proj", "transformer.h.11.mlp.c_fc", "project_in"]
    assert [block_of(name) for name in names] == ["model.layers.3", "transformer.h.11", "project_in"]


@pytest.mark.parametrize("part_bytes", [1, 300 * 64, 2**20])
def test_a_head_on_the_host_gives_the_logits_of_the_whole_part_by_part(part_bytes: int) -> None:
    model = load_model(tiny_checkpoint("gemma2", tie_word_embeddings=False), run_config())
    hidden = torch.randn(2, 5, 64)
    expected = model.logits(hidden)
    head = HostHead(model.head.base, None, device=torch.device("cpu"), part_bytes=part_bytes)
    model.network.set_submodule("lm_head", head)
    torch.testing.assert_close(model.logits(hidden), expected)
    pieces = [part(hidden) for _, part in model.head_parts()]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), expected)
    assert len(pieces) == -(-300 // head.words_at_once)


def test_a_head_on_the_host_comes_in_parts_of_the_chunk_that_was_asked_for() -> None:
    model = load_model(tiny_checkpoint("gemma2", tie_word_embeddings=False), run_config())
    model.device = torch.device("meta")  # in a GPU's place: the order of things is the same
    for words in (10, 40):
        settle(model, run_config(offload="embeddings").model_copy(update={"logits_chunk": words * 64 * 4}))
        assert isinstance(model.head, HostHead)
        assert model.head.words_at_once == words


def test_embeddings_on_the_host_are_found_whatever_they_are_asked_by_name() -> None:
    class Positions(torch.nn.Embedding):
        def forward(self, mask: torch.Tensor, past: int, *, position_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(position_ids + past) * mask.unsqueeze(-1)

    table = Positions(9, 4)
    handles = embed_on_host(table, device=torch.device("cpu"))
    ids, mask = torch.tensor([[1, 2]]), torch.tensor([[1.0, 0.0]])
    seen = table(mask, 3, position_ids=ids)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen, table(mask, 3, position_ids=ids))


@pytest.fixture(autouse=True)
def cache_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    assert not list((tmp_path / "agzo-edge").glob("*"))  # files without a name
