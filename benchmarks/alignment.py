"""How well an estimated gradient points along the true one, at the same number of forwards.

    OMP_NUM_THREADS=1 python benchmarks/alignment.py [--quick] [--models DIR ...] [--text FILE] [--output FILE]

The true gradient is back-propagation's, in float32, over the weights of all linear layers but the head, of the
mean loss per token of 16 rows of real text; what a form leaves alone counts against it. Each draw is a step's
estimate from fresh noise and two forwards of the rows it sees; its score is the cosine with the true gradient. Draws
are spread over several batches.

    mezo      one Gaussian direction over the same weights, central difference, eps = 1e-3
    paper     `--preset paper`: one shared Gaussian direction inside rank-1 bases, K = 3, forward difference
    plain     ours with relative = False: a direction of signs for each example, central difference; this
              estimates the gradient itself
    relative  the same with relative perturbations, each layer's estimate multiplied by the square of its scale: a
              preconditioned gradient on purpose
    default   ours as it ships: relative, on the layers that write to the residual stream, guided at the head. A
              window's guide is made of these rows and serves five steps; its forwards are not counted here

`examples` is how many of the 16 rows the step sees, each with a direction of its own; with fewer, `own` is the
cosine with the gradient of those rows. `cosine` is always with that of all 16. `share` is the part of the true
gradient's squared norm inside the bases. `agreement` in the JSON says how many of the rows pull the same way: a
direction for each example gains most where they agree, as they do on text that is new to the model.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from baselines import Mezo
from environment import SHARED, environment, leave_result, parser_of
from gradients import Gradient, agreement, cosine_of, squared_norm, true_gradient
from torch import Tensor

from agzo_edge.config import RunConfig, config_from
from agzo_edge.model.load import load_model
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.basis import starting_basis
from agzo_edge.numerics.estimate import gradient_estimate
from agzo_edge.train.data import Batch, Example, collate, pad_id_of
from agzo_edge.train.goal import goal_of
from agzo_edge.train.objective import GOALS, loss_of
from agzo_edge.train.probe import probe_mu
from agzo_edge.train.step import find_window, measure
from agzo_edge.train.tokens import TokenRow

MODELS = ("tiny-novels", "stories260K")
BATCH_EXAMPLES = 16
PLAIN_MU = 1e-3  # the paper's; absolute, so a model of another size may want another
ALL_LAYERS = {"target_modules": ("all-linear",), "guide": "none"}
DENSE = {"device": "cpu", "dtype": "float32", "load_in_4bit": False, "batch_size": BATCH_EXAMPLES}


@dataclass(frozen=True)
class Draw:
    """One estimate's score."""

    cosine: float  # with the gradient of all rows
    own: float  # with the gradient of the rows that it saw


def text_batches(model: EdgeModel, text: str, *, batches: int, tokens: int) -> list[list[Example]]:
    """Rows of `tokens` tokens, evenly spread over `text`."""
    n_rows = batches * BATCH_EXAMPLES
    every = len(text) // n_rows
    rows = []
    for i in range(n_rows):
        ids = model.tokenizer(text[i * every : (i + 1) * every], add_special_tokens=False)["input_ids"][:tokens]
        row = TokenRow(np.array(ids, dtype=np.int64), np.arange(len(ids)) > 0)
        rows.append(Example((row,), 0, f"row {i}"))
    return [rows[start : start + BATCH_EXAMPLES] for start in range(0, n_rows, BATCH_EXAMPLES)]


def mezo_draws(model: EdgeModel, batch: Batch, gradient: Gradient, *, seeds: range) -> Iterator[Draw]:
    """MeZO's estimates g z."""
    weights = [layer.base.dense() for layer in model.layers.values()]
    mezo = Mezo(weights, lambda: float(batch.weights @ loss_of(model, batch, goal=GOALS["lm"])[0]))
    for seed in seeds:
        projected = mezo.projected_gradient(seed)
        cosine = cosine_of(
            [(projected * z, true) for z, true in zip(mezo.directions(seed), gradient, strict=True)], gradient
        )
        yield Draw(cosine, cosine)


@dataclass
class Agzo:
    """AGZO in one setting, on one model whose branches it sets up."""

    form: str
    whole: EdgeModel  # with a branch at every linear layer
    model: EdgeModel  # the one that is perturbed
    config: RunConfig
    examples: int  # rows that a step sees
    chosen: Sequence[int]  # of all linear layers, in the gradient's order, those that have a branch

    def draws(self, rows: Sequence[Example], gradient: Gradient, *, steps: range) -> Iterator[Draw]:
        """The estimates of these steps' noise, on bases found from the rows that the step sees."""
        pad_id = pad_id_of(self.model.tokenizer)
        batch = collate(rows[: self.examples], pad_id=pad_id, objective="lm")
        own = gradient if self.examples == len(rows) else true_gradient(self.whole, batch)
        self.begin(batch)
        inside = [self._inside(g) for g in (gradient, own)]
        for step in steps:
            estimates = self._estimates(batch, step=step)
            yield Draw(
                cosine_of(list(zip(estimates, inside[0], strict=True)), gradient),
                cosine_of(list(zip(estimates, inside[1], strict=True)), own),
            )

    def share(self, gradient: Gradient) -> float:
        """The part of the gradient's squared norm inside the present bases."""
        return squared_norm(self._inside(gradient)) / squared_norm(gradient)

    def _inside(self, gradient: Gradient) -> Gradient:
        """The gradient of each branch's coefficients."""
        layers = zip((gradient[i] for i in self.chosen), self.model.branches, strict=True)
        return [part @ branch.group.basis for part, branch in layers]

    def begin(self, batch: Batch) -> None:
        """Fresh branches of this rank, and the bases of `batch`."""
        self.model.context.relative = self.config.relative
        for group in self.model.groups:
            group.basis = starting_basis(group.in_features, min(self.config.rank, group.in_features))
        for branch in self.model.branches:
            branch.c = torch.zeros(branch.out_features, branch.group.rank)
            branch.scale = 1.0
            branch.guide = None if branch.guide is None else torch.zeros_like(branch.c)  # none before to remember
        find_window(self.model, [batch], self.config, goal=goal_of(self.config))

    def _estimates(self, batch: Batch, *, step: int) -> list[Tensor]:
        """Each layer's estimate (out_features, rank) in its basis: what the plain update would follow."""
        mu = self.config.mu
        assert mu != "auto"
        found, _ = measure(self.model, [batch], step=step, mu=mu, config=self.config, goal=goal_of(self.config))
        shares = found.weights * found.projected
        return [
            branch.scale
            * gradient_estimate(
                branch.noise(self.config.noise, shares.shape[0], seed=self.config.seed, step=step, first_example=0),
                shares,
            )
            for branch in self.model.branches
        ]


def probed(model: EdgeModel, rows: Sequence[Example], config: RunConfig) -> float:
    """The mu that `auto` takes on these rows."""
    batch = collate(rows, pad_id=pad_id_of(model.tokenizer), objective="lm")
    find_window(model, [batch], config, goal=goal_of(config))
    return probe_mu(
        lambda mu: measure(model, [batch], step=0, mu=mu, config=config, goal=goal_of(config))[0].projected
    ).mu


def settings_of(
    whole: EdgeModel, shipped: EdgeModel, *, mu: float, ranks: Sequence[int], examples: Sequence[int]
) -> list[Agzo]:
    """AGZO in every setting that is compared."""
    names = [branch.name for branch in whole.branches]
    every, chosen = range(len(names)), [names.index(branch.name) for branch in shipped.branches]
    settings = [Agzo("paper", whole, whole, config_from(DENSE, preset="paper"), BATCH_EXAMPLES, every)]
    for form, changes in (("plain", {"relative": False, "mu": PLAIN_MU}), ("relative", {"mu": mu})):
        for rank in ranks:
            config = config_from(DENSE, ALL_LAYERS, {"rank": rank}, changes)
            settings += [Agzo(form, whole, whole, config, n, every) for n in examples]
    return settings + [Agzo("default", whole, shipped, config_from(DENSE, {"mu": mu}), n, chosen) for n in examples]


def measured(source: Path, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All methods' draws on one model, batch by batch."""
    default = config_from(DENSE)
    model, shipped = (load_model(str(source), config_from(DENSE, more)) for more in (ALL_LAYERS, {}))
    row_batches = text_batches(model, text, batches=arguments.batches, tokens=arguments.tokens)
    mu = probed(shipped, row_batches[0], default)
    settings = settings_of(model, shipped, mu=mu, ranks=arguments.ranks, examples=arguments.examples)
    mezo: list[Draw] = []
    agreements: list[float] = []
    scores: list[list[Draw]] = [[] for _ in settings]
    shares: list[list[float]] = [[] for _ in settings]
    for number, rows in enumerate(row_batches):
        steps = range(number * arguments.draws, (number + 1) * arguments.draws)
        batch = collate(rows, pad_id=pad_id_of(model.tokenizer), objective="lm")
        gradient = true_gradient(model, batch)
        agreements.append(agreement(model, batch, rows, gradient))
        mezo += mezo_draws(model, batch, gradient, seeds=steps)
        for agzo, its_scores, its_shares in zip(settings, scores, shares, strict=True):
            its_scores += agzo.draws(rows, gradient, steps=steps)
            its_shares.append(agzo.share(gradient))
    methods = [scored("mezo", mezo, examples=BATCH_EXAMPLES)]
    for agzo, its_scores, its_shares in zip(settings, scores, shares, strict=True):
        share = statistics.mean(its_shares)
        methods.append(scored(agzo.form, its_scores, rank=agzo.config.rank, examples=agzo.examples, share=share))
    weights = sum(branch.out_features * branch.group.in_features for branch in model.branches)
    facts = {"adapted_weights": weights, "mu": mu, "plain_mu": PLAIN_MU, "agreement": statistics.mean(agreements)}
    return {"model": source.name, **facts, "methods": methods}


def scored(method: str, draws: list[Draw], **facts: Any) -> dict[str, Any]:
    """A method's draws with their mean and its standard error."""
    cosines = [draw.cosine for draw in draws]
    return {
        "method": method,
        **facts,
        "mean_cosine": statistics.mean(cosines),
        "standard_error": statistics.stdev(cosines) / math.sqrt(len(cosines)),
        "mean_own_cosine": statistics.mean(draw.own for draw in draws),
        "cosines": cosines,
        "own_cosines": [draw.own for draw in draws],
    }


def summary_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each method, with its multiple of MeZO and of the paper's form."""
    mezo, paper = (method["mean_cosine"] for method in result["methods"][:2])
    return [
        {
            "model": result["model"],
            "method": method["method"],
            "rank": method.get("rank", "-"),
            "examples": method["examples"],
            "cosine": method["mean_cosine"],
            "± error": method["standard_error"],
            "own": method["mean_own_cosine"],
            "share": method.get("share", 1.0),
            "x mezo": round(method["mean_cosine"] / mezo, 1),
            "x paper": round(method["mean_cosine"] / paper, 2),
        }
        for method in result["methods"]
    ]


def main() -> None:
    """Measure every model."""
    parser = parser_of("alignment", __doc__ or "")
    parser.add_argument("--models", nargs="+", type=Path, default=[SHARED / "models" / m for m in MODELS])
    parser.add_argument("--text", type=Path, default=SHARED / "data/tinyshakespeare/input.txt")
    parser.add_argument("--tokens", type=int, default=64, help="in a row")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--draws", type=int, default=13, help="for each batch")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--examples", nargs="+", type=int, default=[1, 4, BATCH_EXAMPLES])
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.tokens, arguments.batches, arguments.draws = arguments.models[:1], 16, 1, 2
        arguments.ranks, arguments.examples = [4], [BATCH_EXAMPLES]
    transformers.utils.logging.disable_progress_bar()
    began = environment()
    text = arguments.text.read_text(encoding="utf-8")
    results = [measured(source, text, arguments) for source in arguments.models]
    summary = [row for result in results for row in summary_rows(result)]
    default = config_from(DENSE).model_dump(exclude_none=True)
    leave_result(arguments, began=began, summary=summary, config=default, results=results)


if __name__ == "__main__":
    main()
