"""What is settled before a run is planned."""

import pytest
import torch

from agzo_edge import demo
from agzo_edge.budget.facts import model_facts
from agzo_edge.config import UNGUIDED_RANK, RunConfig
from agzo_edge.numerics.lowrank import LowRank
from agzo_edge.preparation import on_adapters_layers

CHANGE = LowRank(torch.zeros(4, 2), torch.zeros(4, 2))  # only its name is looked at


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.o_proj"])
@pytest.mark.parametrize("given", [{}, {"rank": 5}, {"guide": "none"}])
def test_an_adapters_layers_are_trained_as_if_they_had_been_named(layer: str, given: dict[str, object]) -> None:
    name = f"model.layers.0.{layer}"
    config = on_adapters_layers(RunConfig(**given), {name: CHANGE}, model_facts(str(demo.MODEL_DIR)))
    named = RunConfig(target_modules=(name,), **given)
    assert (config.target_modules, config.guide, config.rank) == (named.target_modules, named.guide, named.rank)


def test_full_noise_on_an_adapters_layers_has_the_rank_of_full_noise() -> None:
    changes = {"model.layers.0.self_attn.v_proj": CHANGE}
    assert on_adapters_layers(RunConfig(), changes, model_facts(str(demo.MODEL_DIR))).rank == UNGUIDED_RANK
