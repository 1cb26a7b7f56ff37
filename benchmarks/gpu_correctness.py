"""Whether the device computes what the CPU computes, and how exact its directional derivatives are."""

from functools import partial

import torch
from gpu_measure import Row, Rows
from gpu_models import Setting, random_model
from step_cost import random_batch
from torch import Tensor

from agzo_edge.config import RunConfig
from agzo_edge.model.device import sent
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.noise import draw_noise
from agzo_edge.train.data import Batch
from agzo_edge.train.goal import goal_of
from agzo_edge.train.learner import Learner
from agzo_edge.train.step import agzo_step, find_window, measure

MU = 1e-2
SIZES = (1e-1, 1e-2, 1e-3, 1e-4)
EXAMPLES, TOKENS = 4, 32


def correctness(setting: Setting) -> Rows:
    """One step of a tiny 4-bit model against the same on the CPU in float32: noise, bases, losses, update.

    float16 and bfloat16 differ by their rounding; float32 must agree to the order of its sums.
    """
    batch = random_batch(EXAMPLES, tokens=TOKENS, vocab=256)
    reference = _step(setting.config(device="cpu", dtype="float32"), batch)
    for dtype in setting.dtypes():
        found = _step(setting.config(dtype=dtype), batch)
        yield {
            "dtype": dtype,
            "same_noise": bool(torch.equal(_noise(setting.device), _noise(torch.device("cpu")))),
            "stored_bytes_that_differ": _differing(found["model"], reference["model"]),
            "loss": found["loss"],
            "loss_off_by": abs(found["loss"] / reference["loss"] - 1),
            "projected_cosine": _cosine(found["projected"], reference["projected"]),
            "update_cosine": _cosine(found["update"], reference["update"]),
        }


def _step(config: RunConfig, batch: Batch) -> Row:
    """The loss, the projected gradients and what one step learned, on the CPU."""
    model = random_model("tiny", config)
    learner = Learner(model.branches, config)
    record = agzo_step(model, [batch], learner, step=0, mu=MU, config=config, goal=goal_of(config))
    # C Aᵀ and not C: a basis may come out with other signs, and the noise is drawn in its coordinates
    update = torch.cat([branch.learned().dense().cpu().flatten() for branch in model.branches])
    return {"model": model, "loss": record.loss, "projected": torch.tensor(record.projected), "update": update}


def _noise(device: torch.device) -> Tensor:
    drawn = draw_noise("sign", (4, 1000, 3), seed=1, step=2, layer=3, first_example=0)
    return drawn.placed(partial(sent, device=device)).dense().cpu()


def _differing(model: EdgeModel, reference: EdgeModel) -> int:
    """Bytes of the quantized layers that came out otherwise than on the CPU: weights on the edge of two codes."""
    pairs = zip(model.layers.values(), reference.layers.values(), strict=True)
    packed = ((dict(one.base.stored())["packed"], dict(other.base.stored())["packed"]) for one, other in pairs)
    return sum(int((one.cpu() != other.cpu()).sum()) for one, other in packed)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def numerics(setting: Setting) -> Rows:
    """The error of the projected gradients by dtype and mu, against the exact tangent in float32 on the same device."""
    batch = random_batch(EXAMPLES, tokens=TOKENS, vocab=256)
    exact = _projected(setting.config(dtype="float32", difference="exact"), batch, mu=1.0)
    for dtype in setting.dtypes():
        carried = _projected(setting.config(dtype=dtype, difference="exact"), batch, mu=1.0)
        yield {"dtype": dtype, "mu": "exact", "relative_error": float((carried - exact).norm() / exact.norm())}
        for mu in SIZES:
            found = _projected(setting.config(dtype=dtype), batch, mu=mu)
            yield {"dtype": dtype, "mu": mu, "relative_error": float((found - exact).norm() / exact.norm())}


def _projected(config: RunConfig, batch: Batch, *, mu: float) -> Tensor:
    """The projected gradients of the first step's noise, on bases found in float32 whatever the dtype."""
    model = random_model("tiny", config)
    bases = random_model("tiny", config.model_copy(update={"dtype": "float32"}))
    find_window(bases, [batch], config, goal=goal_of(config))
    for group, found in zip(model.groups, bases.groups, strict=True):
        group.basis = found.basis
    for branch, found in zip(model.branches, bases.branches, strict=True):
        branch.scale, branch.guide = found.scale, found.guide
    return measure(model, [batch], step=0, mu=mu, config=config, goal=goal_of(config))[0].projected
