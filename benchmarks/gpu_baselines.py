"""What people would use instead, each as a thing that can take a step: plain forward, MeZO, the paper's AGZO, QLoRA."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from baselines import Mezo
from gpu_models import Setting, random_model, random_network
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import logging as transformers_logging

from agzo_edge.model.device import chosen_dtype
from agzo_edge.model.passes import Refresh
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.train.data import Batch
from agzo_edge.train.objective import GOALS, loss_of

LORA_RANK = 16  # as wide as our adapter gets
Step = Callable[[], object]


class PaperInPlace(Mezo):
    """AGZO as published: the perturbation mu R Aᵀ is added to dense weights and taken away again.

    Source: arXiv 2601.17261, Algorithm 1: r = 1, K = 3, forward difference, a basis from each step's plain forward.
    """

    def __init__(self, model: EdgeModel, batch: Batch) -> None:
        self.model, self.batch = model, batch.to(model.device)
        self.shares = batch.weights
        weights = [layer.base.dense() for layer in model.layers.values()]
        super().__init__(weights, lambda: self._loss(Refresh.NONE), eps=1e-3)

    def _loss(self, refresh: Refresh) -> float:
        return float(self.shares @ loss_of(self.model, self.batch, goal=GOALS["lm"], refresh=refresh)[0].cpu())

    def projected_gradient(self, seed: int) -> float:
        """(l⁺ − l⁰) / eps, the bases found in the forward that gives l⁰."""
        at_zero = self._loss(Refresh.IN_PASS)
        self._add(seed, self.eps)
        positive = self.loss()
        self._add(seed, -self.eps)
        return (positive - at_zero) / self.eps

    def directions(self, seed: int) -> Iterator[Tensor]:
        """R Aᵀ for each weight (out, in)."""
        generator = torch.Generator(device=self.weights[0].device).manual_seed(seed)
        for branch, weight in zip(self.model.branches, self.weights, strict=True):
            r = torch.randn(branch.c.shape, generator=generator, device=weight.device)
            yield (r @ branch.group.basis.mT).to(weight.dtype)


def dense_model(setting: Setting, shape: str) -> EdgeModel:
    """The shape with dense weights in 16 bit (float32 on a CPU), as MeZO and the paper's AGZO need them."""
    paper = {"rank": 1, "relative": False, "power_iterations": 3}
    return random_model(shape, setting.config(load_in_4bit=False, **paper))


def mezo_step(model: EdgeModel, batch: Batch) -> Step:
    """A MeZO step on the layers that AGZO adapts: two forwards of B rows, four passes over the weights."""
    weights = [layer.base.dense() for layer in model.layers.values()]
    there = batch.to(model.device)
    mezo = Mezo(weights, lambda: float(batch.weights @ loss_of(model, there, goal=GOALS["lm"])[0].cpu()))
    return lambda: mezo.step(0, learning_rate=1e-6)


def paper_step(model: EdgeModel, batch: Batch) -> Step:
    """A step of the paper's AGZO, in place."""
    paper = PaperInPlace(model, batch)
    return lambda: paper.step(0, learning_rate=1e-6)


def qlora_step(setting: Setting, shape: str, batch: Batch) -> Step:
    """A QLoRA step over B rows: peft, bitsandbytes' layers, gradient checkpointing, paged 8-bit Adam (plain on a CPU).

    Source: Dettmers et al., arXiv 2305.14314; logits and loss are transformers' own.
    """
    network, optimizer = qlora(setting, shape)
    ids, mask = batch.input_ids.to(setting.device), batch.attention_mask.to(setting.device)

    def step() -> None:
        optimizer.zero_grad()
        network(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()

    return step


def qlora(setting: Setting, shape: str) -> tuple[Any, torch.optim.Optimizer]:
    """The network with its LoRA layers, ready to train, and the optimizer."""
    import bitsandbytes as bnb

    transformers_logging.set_verbosity_error()
    dtype = chosen_dtype("auto", setting.device)
    network = random_network(shape, setting.device, dtype)
    head = network.get_output_embeddings()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            network.set_submodule(name, _four_bit(module, dtype).to(setting.device))
    # without peft's prepare_model_for_kbit_training, which would hold embeddings and head in float32
    network.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = get_peft_model(network, config).train()
    weights = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    return trained, bnb.optim.PagedAdamW8bit(weights) if setting.on_gpu else torch.optim.AdamW(weights)


def _four_bit(module: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """The layer as bitsandbytes' own, NF4 with double quantization; it quantizes when it is moved to the device."""
    import bitsandbytes as bnb

    kind = {"quant_type": "nf4", "compress_statistics": True}
    layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype, **kind)
    layer.weight = bnb.nn.Params4bit(module.weight.data.contiguous(), requires_grad=False, **kind)
    return layer
