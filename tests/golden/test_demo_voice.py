"""The worked adapter in adapters/demo-voice, written by an earlier version, still does what it did."""

from pathlib import Path

import pytest

import agzo_edge
from agzo_edge import demo
from agzo_edge.serve.generate import TextModel

ADAPTER = Path(__file__).resolve().parents[2] / "adapters" / "demo-voice"


@pytest.fixture(scope="module")
def pirate() -> TextModel:
    return agzo_edge.load(str(demo.MODEL_DIR), adapter=ADAPTER)


@pytest.mark.parametrize("prompt", demo.PROMPTS)
def test_the_worked_adapter_answers_in_its_voice(pirate: TextModel, prompt: str) -> None:
    answer = pirate.generate(prompt)
    assert answer.startswith("Arr, matey! The ")
    assert answer.endswith("of the seven seas!")


def test_the_worked_adapter_keeps_its_held_out_loss() -> None:
    loss = agzo_edge.evaluate(str(demo.MODEL_DIR), adapter=ADAPTER).loss
    assert loss == pytest.approx(HELD_OUT_LOSS, rel=0.01), "other last bits on another CPU, not another adapter"


HELD_OUT_LOSS = 0.617  # report.json of its run, and here with the weights rounded to bfloat16
