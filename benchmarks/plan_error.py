"""How far is the plan from the peak that a run then has?

Runs are drawn by a seed: a family, its sizes, how it is stored and quantized, target, objective, difference,
rank, batch, row lengths, pieces, offload. Each is a whole run through the public API (load, evaluate, steps,
checkpoint) in a process of its own, forked from one that has imported everything. The measured peak is anonymous
memory over what that process had before, sampled from outside once a millisecond; the predicted one is the
plan's device bytes without its lines for the libraries and the tokenizer (500 words here, whatever the vocabulary).
Error: |measured − predicted| / measured.

No GPU: the CPU's plan alone is tried.
"""

import gc
import json
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from environment import environment, leave_result, parser_of
from tokenizers import Tokenizer, models, pre_tokenizers

from agzo_edge.config import RunConfig, config_from
from agzo_edge.events import Finished, Planned
from agzo_edge.model.memory import give_back
from agzo_edge.session import training
from agzo_edge.units import MIB

SAMPLE_S = 0.001
VOCABULARIES = (16_000, 32_000, 64_000)
SIZES = (256, 384, 512, 768, 1024)  # hidden
WORDS = 500  # of the tokenizer: the rest of the vocabulary is never met, and costs the same
DTYPES = ("float32", "bfloat16")
THERE_BEFORE = ("context", "tokenizer")  # in a plan, and no part of what is measured
FAMILIES = {
    "llama": "LlamaConfig",
    "granite": "GraniteConfig",
    "qwen3": "Qwen3Config",
    "mistral": "MistralConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "phi3": "Phi3Config",
    "gpt2": "GPT2Config",
    "neox": "GPTNeoXConfig",
    "opt": "OPTConfig",
}


def drawn(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` combinations: the model's part, the data's and the settings."""
    dice = random.Random(seed)
    for number in range(count):
        family = list(FAMILIES)[number % len(FAMILIES)]  # each as often as the others
        tokens = dice.choice((64, 128, 256, 512))
        rows = dice.choice([n for n in (1, 2, 4, 8, 16) if 256 <= n * tokens <= 2048])
        objective = dice.choice(("lm", "lm", "choice", "preference"))
        batch = max(1, rows // {"lm": 1, "choice": 3, "preference": 2}[objective])
        bits = dice.choice(({}, {}, {"load_in_4bit": False}, {"load_in_8bit": True}, {"double_quant": True}))
        settings = {
            "objective": objective,
            "batch_size": batch,
            "micro_batch_size": dice.choice((None, None, max(1, batch // 2))),
            "rank": dice.choice((1, 4, 4, 16)),
            "adapter_rank": dice.choice((4, 16, 64)),
            "refresh_every": dice.choice((1, 2, 25)),
            "noise": dice.choice(("sign", "sign", "gaussian")),
            "directions": dice.choice(("example", "example", "shared")),
            "difference": dice.choice(("central", "central", "forward", "exact")),
            "optimizer": dice.choice(("sgd", "momentum", "adam")),
            "target": dice.choice(("adapter", "adapter", "adapter", "dequantized")),
            "dtype": dice.choice(("float32", "float32", "float32", "bfloat16")),
            "fuse_signs": dice.choice((True, True, False)),
            "mlp_chunk_tokens": dice.choice((None, None, None, tokens // 2)),
            "logits_chunk": dice.choice(("64MiB", "64MiB", "16MiB")),
            "offload": dice.choice(("none", "none", "none", "embeddings", "layers")),
            "max_seq_length": tokens,
            "max_steps": dice.choice((2, 3)),
            "target_modules": dice.choice((None, ("all-linear",))),
            **bits,
        }
        model = {
            "family": family,
            "hidden": dice.choice(SIZES),
            "vocab": dice.choice(VOCABULARIES),
            "layers": dice.choice((2, 3)),
            "stored": dice.choice(("float32", "bfloat16")),
            "grouped": dice.choice((1, 2, 4)),
        }
        if objective == "preference" and settings["target"] == "dequantized":
            settings["preference_loss"] = "simpo"  # dpo refers to a base that is not written to
        yield {"model": model, "settings": settings, "evaluates": dice.random() < 0.3}


def checkpoint(root: Path, wanted: dict[str, Any]) -> Path:
    """A random model of these sizes, made once, with a tokenizer whose words are its tokens."""
    folder = root / "-".join(map(str, wanted.values()))
    if folder.exists():
        return folder
    family, hidden = wanted["family"], wanted["hidden"]
    heads = hidden // 64
    sizes: dict[str, Any] = {"vocab_size": wanted["vocab"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        sizes |= {"n_embd": hidden, "n_layer": wanted["layers"], "n_head": heads, "n_positions": 1024}
    else:
        shapes = {"hidden_size": hidden, "num_hidden_layers": wanted["layers"], "num_attention_heads": heads}
        sizes |= {**shapes, "intermediate_size": 3 * hidden, "max_position_embeddings": 1024}
        if family not in ("neox", "opt"):
            sizes["num_key_value_heads"] = next(n for n in (heads // wanted["grouped"], 1) if n and heads % n == 0)
        if family in ("qwen3", "gemma2", "gemma3"):
            sizes["head_dim"] = 64
    if family == "opt":
        sizes |= {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}
    if family in ("mistral", "gemma2", "gemma3"):
        sizes["sliding_window"] = 64
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, FAMILIES[family])(**sizes))
    model.to(getattr(torch, wanted["stored"])).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def write_rows(path: Path, combination: dict[str, Any]) -> Path:
    """Rows of the run's objective: one of the allowed length less a few tokens, the others near it."""
    settings = combination["settings"]
    dice = np.random.default_rng(0)

    def text(n_tokens: int) -> str:
        return " ".join(f"w{i}" for i in dice.integers(0, WORDS, n_tokens))

    longest = settings["max_seq_length"] - 4  # a template may add a few
    rows: list[dict[str, Any]] = []
    for number in range(2 * settings["batch_size"]):
        length = longest - number % 5
        prompt = text(length // 2)
        if settings["objective"] == "lm":
            rows.append({"text": text(length)})
        elif settings["objective"] == "choice":
            options = [text(length - length // 2) for _ in range(3)]
            rows.append({"prompt": prompt, "options": options, "answer": number % 3})
        else:
            chosen, rejected = text(length - length // 2), text(length - length // 2)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def warm_up(root: Path, *, dtypes: Sequence[str] = DTYPES) -> None:
    """Runs in this process, so that its children find everything imported and every cache filled.

    One is as large as those to come: a matmul library keeps buffers of the size that it once needed, and a run
    of its own has them among what the plan calls libraries.
    """
    for name in FAMILIES.values():  # the module of each family's model
        _ = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[getattr(transformers, name)]
    large = {"family": "llama", "hidden": SIZES[-1], "vocab": VOCABULARIES[0], "layers": 2}
    small = {"family": "llama", "hidden": SIZES[0], "vocab": 1000, "layers": 2}
    for sizes, settings, evaluates in (
        (large, {"batch_size": 4, "max_seq_length": 512, "noise": "gaussian", "dtype": "bfloat16"}, False),
        (large, {"batch_size": 4, "max_seq_length": 512, "noise": "gaussian"}, False),
        (small, {"batch_size": 2, "max_seq_length": 32, "difference": "exact"}, True),
        (small, {"batch_size": 2, "max_seq_length": 32, "load_in_8bit": True, "objective": "choice"}, False),
    ):
        if settings.get("dtype", "float32") not in dtypes:
            continue
        model = sizes | {"stored": "float32", "grouped": 1}
        common = {"objective": "lm", "max_steps": 2, "refresh_every": 1}
        with tempfile.TemporaryDirectory() as folder:
            run_once(checkpoint(root, model), {"settings": common | settings, "evaluates": evaluates}, Path(folder))


def run_once(model: Path, combination: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plan of a run, after the run."""
    told: dict[str, Any] = {}
    for event in training(config_of(model, combination, folder, {})):
        if isinstance(event, Planned):
            told |= event.plan.to_dict()
        if isinstance(event, Finished):
            told["memory"] = event.run.report["memory"]
    return told


def config_of(model: Path, combination: dict[str, Any], folder: Path, more: dict[str, Any]) -> RunConfig:
    """The run of a combination, its rows and its output in `folder`, with `more` settings."""
    data = str(write_rows(folder / "rows.jsonl", combination))
    fixed = {
        "model": str(model),
        "data": data,
        "eval_data": data if combination["evaluates"] else None,
        "output_dir": str(folder / "out"),
        "device": "cpu",
        "mu": 0.01,
        "threads": 1,
        "overlong": "truncate",
    }
    return config_from(fixed, combination["settings"], more)


def measured(model: Path, combination: dict[str, Any]) -> dict[str, Any]:
    """The run in a child, watched from here: the plan, the peak over the start, or what went wrong."""
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reader)
                plan = run_once(model, combination, Path(folder))
                os.write(writer, json.dumps(plan).encode())
                code = 0
            except BaseException:  # noqa: BLE001  # whatever it is, it is told
                os.write(writer, traceback.format_exc()[-2000:].encode())
            finally:
                os._exit(code)
        os.close(writer)
        start = peak = anonymous_of(child)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            peak = max(peak, anonymous_of(child))
            time.sleep(SAMPLE_S)
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read().decode()
    try:
        return {"plan": json.loads(told), "peak_bytes": peak - start}
    except ValueError:
        return {"failed": told}


def predicted_bytes(plan: dict[str, Any]) -> int:
    """The peak that a plan expects over what a run's process had before."""
    there_before = sum(part["bytes"] for part in plan["components"] if part["name"] in THERE_BEFORE)
    return int(plan["device_bytes"] - there_before)


def anonymous_of(process: int) -> int:
    """Anonymous bytes of a process; 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def main() -> None:
    """Draw, run, compare."""
    parser = parser_of("plan_error", __doc__ or "")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, help="where the models are kept; by default they are thrown away")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of combinations to run alone")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the combinations that are run")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.count = 2
    began, until = environment(), time.monotonic() + arguments.seconds
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as thrown_away:
        root = arguments.models or Path(thrown_away)
        warm_up(root, dtypes=arguments.dtypes)
        for number, combination in enumerate(drawn(arguments.seed, arguments.count)):
            if time.monotonic() > until:
                break
            wanted = combination["settings"]["dtype"] in arguments.dtypes
            if not wanted or (arguments.only and number not in arguments.only):
                continue
            model = checkpoint(root, combination["model"])
            gc.collect()
            give_back(torch.device("cpu"))
            result = {"number": number, **combination, **measured(model, combination)}
            if "plan" in result:
                result["predicted_bytes"] = predicted_bytes(result["plan"])
                result["error"] = result["predicted_bytes"] / result["peak_bytes"] - 1
            results.append(result)
            print(_line(result), file=sys.stderr, flush=True)
    leave_result(arguments, began=began, summary=_summary(results), results=results)


def _line(result: dict[str, Any]) -> str:
    """A result in a line: its number, its model, the error, what was measured and predicted, the fullest moment."""
    name = f"{result['number']:4d} {'-'.join(map(str, result['model'].values())):32}"
    if "failed" in result:
        return f"{name} failed: {result['failed'].strip().splitlines()[-1]}"
    moment = next(part["formula"] for part in result["plan"]["components"] if part["name"] == "activations")
    amounts = f"{result['peak_bytes'] / MIB:7.1f} MiB, predicted {result['predicted_bytes'] / MIB:7.1f}"
    return f"{name} {result['error']:+.3f} {amounts} {moment.rpartition('(')[2]}"


def _summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over all, and by family: median and 95th percentile of the size of the error, the lowest and the highest."""
    rows = []
    for family in ("all", *FAMILIES):
        mine = [r for r in results if family in ("all", r["model"]["family"])]
        errors = np.array([r["error"] for r in mine if "error" in r])
        if len(errors):
            sizes = np.abs(errors)
            row = {
                "median": np.median(sizes),
                "p95": np.percentile(sizes, 95),
                "min": errors.min(),
                "max": errors.max(),
            }
            told = {name: float(value) for name, value in row.items()}
            rows.append({"family": family, "runs": len(mine), "failed": len(mine) - len(errors)} | told)
    return rows


if __name__ == "__main__":
    main()
