"""The model as the rest of the program sees it."""

import pytest
import torch
from helpers import FAMILIES, VOCAB, run_config, tiny_batch, tiny_checkpoint, tiny_model

from agzo_edge.errors import ModelError
from agzo_edge.model.load import load_model

SHARED_INPUTS = {  # of one decoder layer; every other layer has an input of its own
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "qwen2": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "qwen3": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "mistral": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "gemma2": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "gemma3": [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "phi3": [],
    "gpt2": [],
    "neox": [],
    "opt": [{"q_proj", "k_proj", "v_proj"}],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_share_a_basis_exactly_when_they_read_the_same_input(family: str) -> None:
    model = tiny_model(family)
    members: dict[int, list[str]] = {}
    for branch in model.branches:
        members.setdefault(branch.group.index, []).append(branch.name)
    shared = [names for names in members.values() if len(names) > 1]
    assert [{name.rsplit(".", 1)[1] for name in names} for names in shared] == SHARED_INPUTS[family] * 2
    for names in shared:
        assert len({name.rsplit(".", 2)[0] for name in names}) == 1  # of one decoder layer
    assert sorted(group.index for group in model.groups) == list(range(len(model.groups)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_has_a_branch_of_its_shape(family: str) -> None:
    model = tiny_model(family)
    head = model.network.get_output_embeddings()
    layers = model.layers
    assert head not in layers.values()
    assert [branch.name for branch in model.branches] == list(layers)
    assert [branch.index for branch in model.branches] == list(range(len(layers)))
    for branch, layer in zip(model.branches, layers.values(), strict=True):
        assert branch.shape == (layer.out_features, layer.in_features)
        assert branch.group.rank == 4
    assert model.vocab_size == VOCAB


def test_a_basis_is_never_wider_than_its_input() -> None:
    model = load_model(tiny_checkpoint("llama"), run_config(rank=64))
    assert {branch.group.rank for branch in model.branches} == {64}
    narrow = load_model(tiny_checkpoint("llama", intermediate_size=40), run_config(rank=64))
    assert {branch.c.shape[1] for branch in narrow.branches if "down_proj" in branch.name} == {40}


def test_a_forward_that_reads_a_layers_weight_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    real = modeling_llama.LlamaMLP.forward

    def looking(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return real(self, x.to(self.down_proj.weight.dtype))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", looking)
    with pytest.raises(ModelError, match=r"its own forward pass fails: .*'weight'"):
        load_model(tiny_checkpoint("llama"), run_config())


def test_layers_that_the_forward_never_calls_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    real = modeling_llama.LlamaMLP.__init__

    def with_a_spare(self: torch.nn.Module, config: object) -> None:
        real(self, config)
        self.spare = torch.nn.Linear(8, 8)

    source = tiny_checkpoint("llama", num_hidden_layers=1)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", with_a_spare)
    with pytest.raises(ModelError, match=r"spare"):
        load_model(source, run_config())


@pytest.mark.parametrize("width", [{}, {"load_in_4bit": True, "double_quant": True}, {"load_in_8bit": True}])
def test_the_hash_of_the_base_sees_every_stored_tensor(width: dict[str, bool]) -> None:
    model = tiny_model("qwen2", **width)
    before = model.base_sha256()
    assert model.base_sha256() == before
    names = [name for name, _ in model.stored_tensors()]
    assert len(names) == len(set(names))
    for name, tensor in list(model.stored_tensors()):
        first = tensor.view(-1)[:1].view(torch.uint8)  # its first bytes
        kept = first.clone()
        first ^= 1
        assert model.base_sha256() != before, name
        first.copy_(kept)
    assert model.base_sha256() == before


def test_gemmas_caps_are_part_of_its_logits() -> None:
    model, batch = tiny_model("gemma2"), tiny_batch(2)
    with torch.no_grad():
        logits = model.logits(100 * model.hidden_states(batch.input_ids))
    assert 1.9 < float(logits.abs().max()) <= 2.0
