"""The embedded default of `agzo-edge train`: a tiny model and a voice for it to learn.

The model is a Qwen3 of 2.4 million parameters that has read novels and stories for children; the data
are questions a child might ask, answered by a pirate. Both are our own: see model/SOURCE.md, and
`make_model` and `make_data`, which wrote them.
"""

from itertools import count, takewhile
from pathlib import Path

_HERE = Path(__file__).resolve().parent
MODEL_DIR = _HERE / "model"
DATA_DIR = _HERE / "data"
TRAIN_NAME = "train.jsonl"
VALID_NAME = "valid.jsonl"

# Held-out questions, answered before and after training. They were chosen, after a run, among those whose
# answer names what was asked about; some 3 in 10 do. So small a model picks up the voice and little else.
PROMPTS = ("Do you like the bird?", "What does the boy do?")


def demo_settings() -> dict[str, object]:
    """The settings of the demo's run, by field of RunConfig; the output directory is the caller's."""
    return {
        "model": str(MODEL_DIR),
        "data": str(DATA_DIR / TRAIN_NAME),
        "eval_data": str(DATA_DIR / VALID_NAME),
        "max_seq_length": 64,
        "max_steps": 200,
        "eval_steps": 50,
    }


def demo_directory(*, resume: bool) -> str:
    """The first unused one of adapters/demo, adapters/demo-2, ...; to resume, the last used one."""
    names = ("adapters/demo" if n == 1 else f"adapters/demo-{n}" for n in count(1))
    used = list(takewhile(lambda name: Path(name).exists(), names))
    if resume and used:
        return used[-1]
    return f"adapters/demo-{len(used) + 1}" if used else "adapters/demo"
