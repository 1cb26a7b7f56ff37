"""The configurations in examples/ run as they stand, on the data that they name."""

from pathlib import Path

import pytest
import transformers

import agzo_edge
from agzo_edge.api import resolve
from agzo_edge.config import RunConfig, read_toml
from agzo_edge.train.examples import load_examples

CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"
# Rows of the held-out file, and how often each option is right in it.
HELD_OUT = {"copa": (100, [55, 45]), "rte": (277, [146, 131]), "trec": (500, [9, 94, 138, 65, 81, 113])}


def settings_of(name: str, shared_dir: Path) -> RunConfig:
    """The configuration with its paths found from anywhere."""
    settings = resolve({}, config_file=CONFIGS / f"{name}.toml")
    here = {
        field: str(shared_dir / Path(path).relative_to("../shared"))
        for field in ("model", "data", "eval_data")
        if (path := getattr(settings, field))
    }
    return settings.model_copy(update=here)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_is_one(path: Path) -> None:
    assert RunConfig(**read_toml(path)).output_dir == f"adapters/{path.stem}"


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_choice_counts_its_answers_as_the_file_does(shared_dir: Path, name: str) -> None:
    config = settings_of(name, shared_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    data = load_examples(str(config.eval_data), tokenizer, config, split="validation")
    answers = [example.answer for example in data.examples]
    counts = [answers.count(option) for option in range(max(answers) + 1)]
    assert (len(answers), counts) == HELD_OUT[name]


def test_a_configuration_trains_and_scores(shared_dir: Path, tmp_path: Path) -> None:
    config = settings_of("copa", shared_dir)
    told = {name: getattr(config, name) for name in read_toml(CONFIGS / "copa.toml")}
    quick = {"max_steps": 2, "batch_size": 4, "device": "cpu", "mu": 0.01, "output_dir": str(tmp_path / "run")}
    run = agzo_edge.finetune(**(told | quick))
    assert run.after is not None
    assert run.after.examples == 100
    assert run.after.intervals.keys() == {"loss", "accuracy", "macro_f1"}
