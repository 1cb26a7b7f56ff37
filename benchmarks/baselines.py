"""What AGZO is compared with, written from the papers: MeZO and LOZO, and first-order LoRA by peft."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from agzo_edge.data_config import Objective
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.loss import choice_losses, option_table, row_sums
from agzo_edge.numerics.lowrank import LowRank
from agzo_edge.train.data import Batch


class Mezo:
    """Memory-efficient zeroth-order SGD on dense weights, changed in place.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv 2305.17333,
    Algorithm 1. The direction z is never held: it is drawn again from its seed each time it is needed.
    """

    def __init__(self, weights: Sequence[Tensor], loss: Callable[[], float], *, eps: float = 1e-3) -> None:
        self.weights = weights
        self.loss = loss
        self.eps = eps

    def step(self, seed: int, *, learning_rate: float) -> float:
        """One step; the projected gradient (l⁺ − l⁻) / 2 eps."""
        projected = self.projected_gradient(seed)
        self._add(seed, -learning_rate * projected)
        return projected

    def projected_gradient(self, seed: int) -> float:
        """The two forwards of a step; the weights are back where they were, up to rounding."""
        self._add(seed, self.eps)
        positive = self.loss()
        self._add(seed, -2 * self.eps)
        negative = self.loss()
        self._add(seed, self.eps)
        return (positive - negative) / (2 * self.eps)

    def directions(self, seed: int) -> Iterator[Tensor]:
        """z for each weight, standard normal."""
        generator = torch.Generator(device=self.weights[0].device).manual_seed(seed)
        for weight in self.weights:
            yield torch.empty_like(weight, memory_format=torch.contiguous_format).normal_(generator=generator)

    def _add(self, seed: int, factor: float) -> None:
        for weight, z in zip(self.weights, self.directions(seed), strict=True):
            weight.add_(z, alpha=factor)


class Lozo(Mezo):
    """Low-rank zeroth-order SGD: the direction of a weight is U Vᵀ, of rank r, V kept for a while.

    Source: Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures",
    arXiv 2410.07698, Algorithm 1; the estimate is divided by r there, which is part of the rate here.
    """

    RANK = 2  # both as in the paper's experiments
    KEPT_STEPS = 50

    def directions(self, seed: int) -> Iterator[Tensor]:
        """U Vᵀ for each weight (out, in), U of this seed and V of its interval."""
        device = self.weights[0].device
        of_step = torch.Generator(device=device).manual_seed(seed)
        of_interval = torch.Generator(device=device).manual_seed(2**40 + seed // self.KEPT_STEPS)
        for weight in self.weights:
            u = torch.randn(weight.shape[0], self.RANK, generator=of_step, device=device)
            v = torch.randn(weight.shape[1], self.RANK, generator=of_interval, device=device)
            yield u @ v.mT


class FirstOrderLora:
    """LoRA by back-propagation: peft's layers, torch's AdamW, no dropout, on the layers that `model` trains.

    What was learned is brought into `model`'s own branches by `show`, so that every method is evaluated by the
    same code.
    """

    def __init__(self, model: EdgeModel, *, rank: int, learning_rate: float, seed: int) -> None:
        self.model = model
        network = AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float32)
        for name, layer in model.layers.items():
            weight = network.get_submodule(name).weight.data
            weight.copy_(layer.base.dense().mT if model.transposed else layer.base.dense())
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(model.layers), fan_in_fan_out=model.transposed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network: Any = get_peft_model(network, config)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)

    def step(self, batch: Batch, *, objective: Objective, learning_rate: float) -> float:
        """One step; the batch's loss before it."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        losses = self._row_scores(batch)
        if objective == "choice":
            table = option_table(-losses, batch.example, batch.option, batch.options_shape)
            losses = choice_losses(table, batch.answer)
        loss = batch.weights @ losses[0]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _row_scores(self, batch: Batch) -> Tensor:  # (1, rows)
        """The mean negative log-likelihood of each row's label tokens, as `objective.label_scores`."""
        logits = self.network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        row, token = batch.is_label[:, 1:].nonzero(as_tuple=True)
        losses = F.cross_entropy(logits[row, token], batch.input_ids[row, token + 1], reduction="none")
        n_rows, n_tokens = batch.input_ids.shape
        return row_sums(losses[None], row, token, (n_rows, n_tokens)) / torch.bincount(row, minlength=n_rows)

    @torch.no_grad()
    def show(self) -> None:
        """Put what was learned into the model's branches."""
        for branch in self.model.branches:
            layer = self.network.get_submodule(f"base_model.model.{branch.name}")
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            branch.folded = LowRank(b.clone(), a.mT.clone())
