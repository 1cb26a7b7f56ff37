"""What does a step take beyond what no forward pass can do without?

A model of the widths of Qwen3-0.6B, four blocks of it, with a vocabulary of 151,936, in 4 bit, two rows of 1,024
tokens. Unavoidable are the weights as they are held, embeddings and head among them, and the activations of the
widest layer; the whole matrix of logits would be 2.3 GiB for both signs. The measured peak, sampled as in
plan_error.py over a
process that has imported everything, is put beside that sum.
"""

import gc
import tempfile
from pathlib import Path

import torch
import transformers
from environment import environment, leave_result, parser_of
from plan_error import checkpoint, measured, predicted_bytes, warm_up

from agzo_edge.budget.activations import mlp
from agzo_edge.budget.detect import machine_profile
from agzo_edge.budget.facts import model_facts
from agzo_edge.budget.memory import job_of
from agzo_edge.config import config_from
from agzo_edge.model.memory import give_back
from agzo_edge.units import MIB

HELD = ("weights", "embeddings", "norms")


def main() -> None:
    """One run, and the sum."""
    parser = parser_of("wide_vocabulary", __doc__ or "")
    arguments = parser.parse_args()
    vocab, tokens = (2000, 64) if arguments.quick else (151_936, 1024)
    began = environment()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    settings = {"objective": "lm", "batch_size": 2, "max_seq_length": tokens, "max_steps": 2}
    sizes = {"family": "qwen3", "hidden": 1024, "vocab": vocab, "layers": 4, "stored": "bfloat16", "grouped": 2}
    with tempfile.TemporaryDirectory() as root:
        warm_up(Path(root))
        model = checkpoint(Path(root), sizes)
        job = job_of(model_facts(str(model)), config_from({"device": "cpu"}, settings), machine_profile("cpu"))
        gc.collect()
        give_back(torch.device("cpu"))
        result = measured(model, {"model": sizes, "settings": settings, "evaluates": False})
    parts = {part["name"]: part["bytes"] for part in result["plan"]["components"] if part["where"] == "device"}
    weights = sum(parts[name] for name in HELD)
    activations = max(moment.activations + moment.mask for moment in mlp(job))
    peak = result["peak_bytes"]
    row = {
        "vocabulary": vocab,
        "rows": f"2 x {tokens:,}",
        "weights MiB": weights / MIB,
        "widest layer MiB": activations / MIB,
        "peak MiB": peak / MIB,
        "predicted MiB": predicted_bytes(result["plan"]) / MIB,
        "peak over their sum": peak / (weights + activations),
    }
    leave_result(arguments, began=began, summary=[row], plan=result["plan"])


if __name__ == "__main__":
    main()
