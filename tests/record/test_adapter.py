"""An adapter on disk, against PEFT itself."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from agzo_edge.errors import AgzoError
from agzo_edge.record.adapter import CONFIG_NAME, WEIGHTS_NAME, LowRankPair, load_adapter, save_adapter

# peft 0.21 asks transformers 5.23 for a name that goes in its version 6
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

INPUT = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def _same_weights_each_time() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def tiny_llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tiny_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPTNeoXForCausalLM(config).eval()


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but the head, which GPT-2 shares with its embedding."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    out_features, in_features = layer.weight.shape
    return (in_features, out_features) if isinstance(layer, Conv1D) else (out_features, in_features)


def _random_pairs(model: nn.Module, ranks: tuple[int, ...] = (3, 1, 5)) -> dict[str, LowRankPair]:
    """A pair for every linear layer but every fourth, of different ranks."""
    draw = torch.Generator().manual_seed(1)
    pairs = {}
    for i, (name, layer) in enumerate(_linear_layers(model).items()):
        if i % 4 != 3:
            rank, (out_features, in_features) = ranks[i % len(ranks)], _shape(layer)
            a = torch.randn(rank, in_features, generator=draw)
            pairs[name] = LowRankPair(a, 0.1 * torch.randn(out_features, rank, generator=draw))
    return pairs


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(INPUT).logits
    return logits


def _logits_with(model: nn.Module, pairs: dict[str, LowRankPair]) -> Tensor:
    """The logits when b @ a is added to the weights by hand; the model is as before afterwards."""
    layers = _linear_layers(model)
    changes = {
        name: (pair.b @ pair.a).T if isinstance(layers[name], Conv1D) else pair.b @ pair.a
        for name, pair in pairs.items()
    }
    kept = {name: layers[name].weight.detach().clone() for name in pairs}
    with torch.no_grad():
        for name, change in changes.items():
            layers[name].weight += change
        logits = _logits(model)
        for name, weight in kept.items():
            layers[name].weight.copy_(weight)
    return logits


def _save(directory: Path, pairs: dict[str, LowRankPair], **other: Any) -> None:
    save_adapter(directory, pairs, **{"base_model": "x/y", "transposed": False, "card": "# card\n"} | other)


def _relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_gpt2, tiny_neox])
def test_peft_computes_what_adding_the_pairs_by_hand_computes(
    tmp_path: Path, make_model: Callable[[], nn.Module]
) -> None:
    model = make_model()
    pairs = _random_pairs(model)
    before, by_hand = _logits(model), _logits_with(model, pairs)
    _save(tmp_path, pairs, transposed=make_model is tiny_gpt2)
    by_peft = PeftModel.from_pretrained(model, str(tmp_path))
    adapted = {name.removeprefix("base_model.model.") for name, m in by_peft.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(pairs)
    assert _relative_error(by_hand, before) > 0.1
    assert _relative_error(_logits(by_peft), by_hand) < 1e-4


def test_what_was_saved_loads_bit_for_bit(tmp_path: Path) -> None:
    pairs = _random_pairs(tiny_llama())
    _save(tmp_path, pairs)
    loaded = load_adapter(tmp_path)
    assert loaded.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert torch.equal(loaded[name].a, pair.a)
        assert torch.equal(loaded[name].b, pair.b)


@pytest.mark.parametrize("rank_stabilized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_that_peft_saved_loads_as_the_same_function(
    tmp_path: Path, rank_stabilized: bool, dtype: torch.dtype
) -> None:
    base = tiny_llama()
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        use_rslora=rank_stabilized,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.\w+_proj": 6},
        alpha_pattern={"^model.layers.0.self_attn.v_proj": 3, "down_proj": 7},
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(dtype).float()
    expected = _logits(model)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)

    plain = tiny_llama()
    plain.load_state_dict(state)
    pairs = dict(load_adapter(tmp_path))
    assert len(pairs) == 8
    assert _relative_error(_logits(plain), expected) > 0.01
    assert _relative_error(_logits_with(plain, pairs), expected) < 1e-5


def test_a_saved_foreign_lora_still_is_the_same_function_in_peft(tmp_path: Path) -> None:
    base = tiny_llama()
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    state = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = get_peft_model(base, config)
    expected = _logits(model)
    model.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    _save(tmp_path / "ours", dict(load_adapter(tmp_path / "theirs")))
    plain = tiny_llama()
    plain.load_state_dict(state)
    assert _relative_error(_logits(PeftModel.from_pretrained(plain, str(tmp_path / "ours"))), expected) < 1e-5


def test_layers_that_share_their_basis_and_layers_of_rank_0_are_stored(tmp_path: Path) -> None:
    basis = torch.randn(2, 8)
    pairs = {
        "q": LowRankPair(basis, torch.randn(4, 2)),
        "k": LowRankPair(basis, torch.randn(4, 2)),
        "v": LowRankPair(basis[:0], torch.empty(4, 0)),
    }
    _save(tmp_path, pairs)
    loaded = load_adapter(tmp_path)
    assert torch.equal(loaded["k"].a, basis)
    assert_close(loaded["v"].b @ loaded["v"].a, torch.zeros(4, 8))


def test_the_card_and_other_files_lie_beside_the_weights(tmp_path: Path) -> None:
    _save(tmp_path, {"q": LowRankPair(torch.ones(1, 2), torch.ones(2, 1))}, extra_files={"t/tok.json": b"{}"})
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {WEIGHTS_NAME, CONFIG_NAME, "README.md", "t/tok.json"}
    with pytest.raises(AgzoError, match="leads outside"):
        _save(
            tmp_path / "x",
            {"q": LowRankPair(torch.ones(1, 2), torch.ones(2, 1))},
            extra_files={"../tok.json": b"{}"},
        )


def _all_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


ONES = {"q": LowRankPair(torch.ones(1, 4), torch.ones(3, 1))}
TWOS = {"q": LowRankPair(torch.full((1, 4), 2.0), torch.ones(3, 1))}
WIDER = {"q": LowRankPair(torch.ones(2, 4), torch.ones(3, 2))}


@pytest.mark.parametrize("after", [TWOS, WIDER])
def test_a_disk_that_fills_up_at_any_write_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: dict[str, LowRankPair]
) -> None:
    _save(tmp_path, ONES)
    before = _all_files(tmp_path)
    write = os.write
    for n_writes in range(3):
        left = iter([True] * n_writes)

        def write_while_there_is_room(descriptor: int, data: bytes, left: Any = left) -> int:
            if not next(left, False):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_while_there_is_room)
            with pytest.raises(AgzoError, match="No space left"):
                _save(tmp_path, after)
        assert _all_files(tmp_path) == before


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.mark.parametrize("after", [TWOS, WIDER])
def test_a_kill_at_any_rename_leaves_the_old_adapter_the_new_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: dict[str, LowRankPair]
) -> None:
    replace = Path.replace
    for n_renames in range(3):
        _save(tmp_path, ONES)
        left = iter([True] * n_renames)

        def replace_while_alive(path: Path, target: Path, left: Any = left) -> Path:
            if not next(left, False):
                raise Killed
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace_while_alive)
            with pytest.raises(Killed):
                _save(tmp_path, after)
        if after is WIDER:  # its configuration differs: between the two there is no adapter
            with pytest.raises(AgzoError, match="its writing was cut short"):
                load_adapter(tmp_path)
        else:
            a = load_adapter(tmp_path)["q"].a
            assert torch.equal(a, (TWOS if n_renames else ONES)["q"].a)


def test_a_pair_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AgzoError, match=r"NaN or infinite weights in 1 layers:\n  q"):
        _save(tmp_path / "x", {"q": LowRankPair(torch.ones(1, 2), torch.full((2, 1), torch.nan))})
    assert not (tmp_path / "x").exists()
