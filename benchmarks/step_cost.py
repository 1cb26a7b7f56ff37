"""What one AGZO step costs over the plain forward of the same rows.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py [--quick] [--output FILE]

A step sends 2B rows through the model: B examples, both signs. The yardstick, `plain`, is the forward of 2B
rows through the same layers with the loss, and without noise, update or adapter. All variants take turns
within each repetition, and a ratio compares times of one repetition: a busy machine slows both sides.

    step          in the middle of a window
    refresh       the first of a window: fold, a plain pass of B rows for bases, scales and guides, then a step
    mean          of the two over a window of `refresh_every` steps
    full ...      with an adapter as wide as it gets, twice adapter_rank; `full refresh` compresses it, which
                  one refresh in three does
    full plain    the forward of the model with that adapter; the last column compares with it
    mezo          arXiv 2305.17333 on the dense float32 weights that AGZO adapts: two forwards of B rows and
                  four passes over the weights

The settings are the default preset's. The model is a random Llama and the rows are random tokens: neither
matters to the time.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from baselines import Mezo
from environment import environment, leave_result, parser_of
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agzo_edge.config import RunConfig, config_from
from agzo_edge.model.load import load_model
from agzo_edge.numerics.lowrank import LowRank
from agzo_edge.train.data import Batch, Example, collate
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import Learner
from agzo_edge.train.objective import GOALS, loss_of
from agzo_edge.train.step import agzo_step
from agzo_edge.train.tokens import TokenRow

MU = 1e-2
WARM_UP_STEPS = 2  # of the window under way: it has begun to learn
Times = dict[str, dict[str, float]]  # variant -> seconds by the clock and of the processor


def saved_model(directory: Path, *, hidden: int, layers: int, vocab: int) -> str:
    """The directory of a random Llama of this size, with a tokenizer that only has to exist."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=vocab,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
    return str(directory)


def random_examples(n: int, *, tokens: int, vocab: int) -> list[Example]:
    """`n` rows of random tokens, all of them labels but the first."""
    ids = np.random.default_rng(0).integers(0, vocab, size=(n, tokens))
    is_label = np.arange(tokens) > 0
    return [Example((TokenRow(row, is_label),), 0, f"row {i}") for i, row in enumerate(ids)]


def random_batch(n: int, *, tokens: int, vocab: int) -> Batch:
    """`random_examples` as one batch."""
    return collate(random_examples(n, tokens=tokens, vocab=vocab), pad_id=0, objective="lm")


class Subject:
    """A model in the middle of a window, with an adapter of some width, put back before every measurement."""

    def __init__(self, source: str, batch: Batch, config: RunConfig, *, folded_rank: int) -> None:
        self.batch, self.config = batch, config
        self.model = load_model(source, config)
        self.learner = Learner(self.model.branches, config)
        for step in range(WARM_UP_STEPS):
            self.step(step)
        generator = torch.Generator().manual_seed(1)
        for branch in self.model.branches:
            c, a = (torch.randn(size, folded_rank, generator=generator) for size in branch.shape)
            branch.folded = LowRank(1e-3 * c, a)
        self.state = self.learner.state()

    def step(self, step: int) -> None:
        """One AGZO step."""
        agzo_step(
            self.model, [self.batch], self.learner, step=step, mu=MU, config=self.config, goal=goal_of(self.config)
        )

    def put_back(self) -> None:
        """Everything learned is as it was; not part of any measured time."""
        self.learner.restore({name: tensor.clone() for name, tensor in self.state.items()})

    def forget(self) -> None:
        """Nothing is learned: the layers compute W x alone."""
        self.put_back()
        for branch in self.model.branches:
            branch.folded, branch.steps_in_window = LowRank(branch.folded.c[:, :0], branch.folded.a[:, :0]), 0


Variant = tuple[Callable[[], Any], Callable[[], Any]]  # (preparation outside the clock, what is timed)


def variants_of(source: str, batch: Batch, twice: Batch, config: RunConfig) -> dict[str, Variant]:
    """The variants on one base, by name. `twice` holds the rows of `batch` two times."""
    fresh = Subject(source, batch, config, folded_rank=0)
    full = Subject(source, batch, config, folded_rank=2 * config.adapter_rank)
    refresh_step = config.refresh_every

    def plain(subject: Subject) -> Callable[[], Any]:
        return lambda: loss_of(subject.model, twice, goal=GOALS["lm"])

    return {
        "plain": (fresh.forget, plain(fresh)),
        "step": (fresh.put_back, lambda: fresh.step(WARM_UP_STEPS)),
        "refresh": (fresh.put_back, lambda: fresh.step(refresh_step)),
        "full plain": (full.put_back, plain(full)),
        "full step": (full.put_back, lambda: full.step(WARM_UP_STEPS)),
        "full refresh": (full.put_back, lambda: full.step(refresh_step)),
    }


def mezo_variant(source: str, batch: Batch, config: RunConfig) -> Variant:
    """A MeZO step on the dense weights of the layers that AGZO adapts."""
    model = load_model(source, config)
    weights = [layer.base.dense() for layer in model.layers.values()]
    mezo = Mezo(weights, lambda: float(batch.weights @ loss_of(model, batch, goal=GOALS["lm"])[0]))
    return lambda: None, lambda: mezo.step(0, learning_rate=1e-6)


def timed(variants: Mapping[str, Variant], *, repetitions: int) -> list[Times]:
    """The times of each repetition, in which every variant runs once; each begins with another one."""
    for prepare, run in variants.values():  # the first call of anything is slower
        prepare()
        run()
    names = list(variants)
    return [
        {name: _times(*variants[name]) for name in names[i % len(names) :] + names[: i % len(names)]}
        for i in range(repetitions)
    ]


def _times(prepare: Callable[[], Any], run: Callable[[], Any]) -> dict[str, float]:
    prepare()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    run()
    return {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}


def with_means(times: Times, *, refresh_every: int) -> Times:
    """`times` and the mean step of a window, fresh and full."""
    means = {
        f"{prefix}mean": {
            clock: (times[f"{prefix}step"][clock] * (refresh_every - 1) + times[f"{prefix}refresh"][clock])
            / refresh_every
            for clock in ("wall_s", "cpu_s")
        }
        for prefix in ("", "full ")
    }
    return times | means


def summary_row(shape: str, base: str, variant: str, repetitions: list[Times]) -> dict[str, Any]:
    """The variant's median time, and the quartiles of its ratio to `plain` in the same repetition."""
    low, median, high = statistics.quantiles(_ratios(repetitions, variant, "plain", "wall_s"), n=4, method="inclusive")
    own_plain = "full plain" if variant.startswith("full") else "plain"
    return {
        "rows x tokens": shape,
        "base": base,
        "variant": variant,
        "median ms": 1e3 * statistics.median(times[variant]["wall_s"] for times in repetitions),
        "over plain": round(median, 3),
        "quartiles": f"{low:.3f} to {high:.3f}",
        "processor time over plain": round(statistics.median(_ratios(repetitions, variant, "plain", "cpu_s")), 3),
        "over (full) plain": round(statistics.median(_ratios(repetitions, variant, own_plain, "wall_s")), 3),
    }


def _ratios(repetitions: list[Times], variant: str, reference: str, clock: str) -> list[float]:
    return [times[variant][clock] / times[reference][clock] for times in repetitions]


def main() -> None:
    """Measure both bases at every shape."""
    parser = parser_of("step_cost", __doc__ or "")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--examples-tokens", nargs="+", default=["8x64", "4x256"], help="B examples x tokens")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repetitions, arguments.examples_tokens = 2, ["2x16"]
        arguments.hidden, arguments.layers, arguments.vocab = 128, 1, 256
    transformers.utils.logging.disable_progress_bar()
    began, summary, raw = environment(), [], {}
    with tempfile.TemporaryDirectory() as folder:
        size = {"hidden": arguments.hidden, "layers": arguments.layers, "vocab": arguments.vocab}
        source = saved_model(Path(folder), **size)
        for shape in arguments.examples_tokens:
            examples, tokens = map(int, shape.split("x"))
            batch, twice = (random_batch(n, tokens=tokens, vocab=arguments.vocab) for n in (examples, 2 * examples))
            dense = config_from({"device": "cpu", "dtype": "float32", "load_in_4bit": False})
            four_bit = dense.model_copy(update={"load_in_4bit": True})
            for base, config in (("float32", dense), ("4bit", four_bit)):
                variants = variants_of(source, batch, twice, config)
                if base == "float32":
                    variants["mezo"] = mezo_variant(source, batch, config)
                repetitions = [
                    with_means(times, refresh_every=config.refresh_every)
                    for times in timed(variants, repetitions=arguments.repetitions)
                ]
                name = f"2x{shape}"
                summary += [summary_row(name, base, variant, repetitions) for variant in repetitions[0]]
                raw[f"{name} {base}"] = repetitions
    leave_result(arguments, began=began, summary=summary, config=dense.model_dump(), repetitions=raw)


if __name__ == "__main__":
    main()
