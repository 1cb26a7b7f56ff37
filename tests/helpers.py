"""Tiny models and batches, made on the spot: nothing here is downloaded and nothing is a mock."""

import atexit
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor

from agzo_edge.budget.job import Component
from agzo_edge.budget.memory import MemoryPlan
from agzo_edge.budget.plan import Rung
from agzo_edge.config import RunConfig, config_from
from agzo_edge.demo import MODEL_DIR
from agzo_edge.model.branch import Branch
from agzo_edge.model.linear import FrozenLinear
from agzo_edge.model.load import auto_class_for, load_model
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.lowrank import LowRank
from agzo_edge.train.data import Batch, Example, collate, micro_batches
from agzo_edge.train.guard import Guard
from agzo_edge.train.tokens import TokenRow
from agzo_edge.writers import ALL_LINEAR

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings

VOCAB = 300
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,  # a wide start: outputs that depend on every weight
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
# Every family, with its own peculiarities switched on and made strong enough to be seen.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen2": ("Qwen2Config", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SHAPE | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": 4}),
    "gemma2": (
        "Gemma2Config",
        SHAPE | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "sliding_window": 4},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        SHAPE | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", SHAPE),
    "gpt2": ("GPT2Config", GPT2_SHAPE | {"initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2}),
    "neox": ("GPTNeoXConfig", SHAPE),
    "opt": ("OPTConfig", SHAPE | {"ffn_dim": 96, "word_embed_proj_dim": 48}),
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

_ROOT = Path(tempfile.mkdtemp(prefix="agzo-edge-tests-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each printable ASCII character, after four special ones."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_tiny(config: Any, directory: Path, *, model_class: Any = transformers.AutoModelForCausalLM) -> Path:
    """A random model of `config` in `directory`, no bias zero and no norm one, with a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(model_class, "from_config", model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_with_images(directory: Path, family: str = "Gemma3Config") -> Path:
    """A model with a tower for images, whose tensors have other names in the file than in the model."""
    tower = IMAGES | {"image_size": 32, "patch_size": 8, "head_dim": 16}
    tower |= {"depth": 2, "num_heads": 2, "out_hidden_size": 64}  # as Qwen names them
    text = SHAPE | ({"model_type": "mistral"} if family == "Mistral3Config" else {})
    config = getattr(transformers, family)(text_config=text, vision_config=tower)
    return save_tiny(config, directory, model_class=auto_class_for(config))


@cache
def tiny_checkpoint(family: str, **changes: Any) -> str:
    """The directory of a random two-layer model of `family`, built once in a session; do not write there."""
    name, settings = FAMILIES[family]
    directory = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=_ROOT))
    return str(save_tiny(getattr(transformers, name)(**{**settings, **changes}), directory))


# All layers under full noise, so that a test of the method meets every kind of layer; guides have their own tests.
EVERY_LAYER = {"target_modules": (ALL_LINEAR,), "guide": "none", "rank": 4, "refresh_every": 25, "learning_rate": 0.1}


def run_config(**settings: Any) -> RunConfig:
    """A run on the CPU with exact-width weights of every layer, unless `settings` say otherwise."""
    around = {"device": "cpu", "dtype": "float32", "load_in_4bit": False}
    return config_from(around, {} if settings.get("guide") == "head" else EVERY_LAYER, settings)


def tiny_model(family: str = "llama", **settings: Any) -> EdgeModel:
    """A tiny model of `family`, loaded anew."""
    return load_model(tiny_checkpoint(family), run_config(**settings))


def reference(source: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a directory, unquantized, with the attention that knows every variant."""
    auto_class = auto_class_for(transformers.AutoConfig.from_pretrained(source))
    return auto_class.from_pretrained(source, dtype=dtype, attn_implementation="eager").eval()


def dense_reference(model: EdgeModel, change: Callable[[Branch], Tensor] | None = None) -> Any:
    """transformers' own model with the weights of `model`, plus `change` of each branch."""
    plain = reference(model.source)
    branches = {branch.name: branch for branch in model.branches}
    with torch.no_grad():
        for name, layer in model.network.named_modules():
            if isinstance(layer, FrozenLinear):
                dense = layer.base.dense().float().clone()
                if change is not None and name in branches:
                    dense += change(branches[name]).float()
                target = plain.get_submodule(name)
                target.weight.copy_(dense.T if type(target).__name__ == "Conv1D" else dense)
    return plain


def reference_logits(plain: Any, batch: Batch) -> Tensor:
    """The logits of transformers' own model (rows, tokens, vocabulary)."""
    with torch.no_grad():
        logits: Tensor = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits


def teach_at_random(model: EdgeModel, *, size: float = 0.02) -> None:
    """Give every branch folded windows and a window under way, as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    for branch in model.branches:
        out_features, in_features = branch.shape
        branch.folded = LowRank(
            size * torch.randn(out_features, 3, generator=generator),
            torch.randn(in_features, 3, generator=generator),
        )
        branch.c = size * torch.randn(branch.c.shape, generator=generator)
        branch.steps_in_window = 1


def tiny_examples(n: int, *, options: int = 1, seed: int = 0, shortest: int = 5) -> list[Example]:
    """Random rows of unlike lengths; the first two or three tokens are prompt."""
    generator = np.random.default_rng(seed)

    def row(prompt: np.ndarray) -> TokenRow:
        completion = generator.integers(4, VOCAB, size=int(generator.integers(shortest - 2, shortest + 4)))
        ids = np.concatenate([prompt, completion]).astype(np.int64)
        return TokenRow(ids, np.arange(len(ids)) >= len(prompt))

    examples = []
    for index in range(n):
        prompt = generator.integers(4, VOCAB, size=2 + index % 2)
        count = options if options == 1 else 2 + index % (options - 1)  # differing numbers of options
        rows = tuple(row(prompt) for _ in range(count))
        examples.append(Example(rows, int(generator.integers(count)), f"notes.jsonl:{index + 1}"))
    return examples


def tiny_batch(n: int = 4, *, options: int = 1, seed: int = 0) -> Batch:
    """`n` random examples in one batch."""
    objective = "lm" if options == 1 else "choice"
    return collate(tiny_examples(n, options=options, seed=seed), pad_id=0, objective=objective)


def tiny_micro_batches(n: int, size: int, *, options: int = 1, seed: int = 0) -> list[Batch]:
    """The same examples as `tiny_batch` in parts."""
    objective = "lm" if options == 1 else "choice"
    examples = tiny_examples(n, options=options, seed=seed)
    return list(micro_batches(examples, micro_batch_size=size, pad_id=0, objective=objective))


def model_logits(model: EdgeModel, batch: Batch) -> Tensor:
    """The unperturbed logits of a batch (rows, tokens, vocabulary)."""
    with torch.no_grad(), model.context.running(mask=batch.attention_mask.bool()):
        return model.logits(model.hidden_states(batch.input_ids))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The distance from what was expected, by its size."""
    return float((got - expected).norm() / expected.norm())


def unlimited(model: EdgeModel, config: RunConfig) -> Guard:
    """A guard with nothing to guard against."""
    part = Component("all", 1, "device", "")
    plan = MemoryPlan(
        profile_name="tests",
        dtype="float32",
        rows=1,
        row_tokens=1,
        components=(part,),
        limit_bytes=2**60,
        host_limit_bytes=None,
    )
    return Guard(model, [Rung(config, plan)])


def assert_same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def loaded_apart(path: Path, asked: str, **settings: int) -> tuple[int, int]:
    """The anonymous bytes that loading a file's examples takes in a process of its own, and a number `asked` of them.

    `asked` is an expression of `data`, an ExampleSet.
    """
    script = (
        "import sys; from transformers import AutoTokenizer\n"
        "from agzo_edge.config import RunConfig; from agzo_edge.model.memory import anonymous_bytes\n"
        "from agzo_edge.train.examples import load_examples\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[2]); tokenizer('warm')\n"
        f"before = anonymous_bytes(); data = load_examples(sys.argv[1], tokenizer, RunConfig(**{settings}))\n"
        f"print(anonymous_bytes() - before, {asked})"
    )
    told = subprocess.run([sys.executable, "-c", script, path, MODEL_DIR], capture_output=True, text=True, check=True)
    grown_bytes, answer = map(int, told.stdout.split())
    return grown_bytes, answer
