"""A step on a GPU, beside the CPU's numbers, the floor, and what people would use instead.

    python benchmarks/gpu.py                            # on a machine with a CUDA device: ends after 8 minutes
    python benchmarks/gpu.py --device cpu --small       # every section that can run on a CPU, tiny: half a minute

libraries     what CUDA, cuBLAS, bitsandbytes and Triton take of the device
correctness   one step on the device against the same on the CPU: noise, losses, update
numerics      the projected gradients' error by dtype and mu
kernels       parts of a layer by themselves, with GB/s
steps         models of 0.6 to 14 billion weights: plain forward, ours, MeZO, the paper's AGZO in place, QLoRA
streaming     layers on the host; a model of 70 billion weights
limits        runs inside imitated cards of 4 to 24 GB
contexts      the longest row in an imitated 8 GB, ours and QLoRA's

Weights and rows are random: neither matters to time or memory. Every section has a file of its own, written anew
after every row, so that a machine that is taken away takes nothing with it. What was not run says why.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from environment import ROOT, environment
from gpu_correctness import correctness, numerics
from gpu_kernels import kernels
from gpu_libraries import libraries
from gpu_limits import contexts, limits
from gpu_measure import Row, Section
from gpu_models import Setting
from gpu_steps import steps
from gpu_streaming import streaming

from agzo_edge.model.device import chosen_device
from agzo_edge.units import GIB

SECTIONS: dict[str, Section] = {
    "libraries": libraries,
    "correctness": correctness,
    "numerics": numerics,
    "kernels": kernels,
    "steps": steps,
    "streaming": streaming,
    "limits": limits,
    "contexts": contexts,
}


def main() -> None:
    """Run the sections one after another."""
    arguments = parsed()
    transformers.utils.logging.disable_progress_bar()
    device = chosen_device(arguments.device)
    if arguments.small:
        torch.set_num_threads(1)
    setting = Setting(device, arguments.small, perf_counter() + arguments.seconds)
    for name in arguments.sections:
        run_section(name, setting, arguments)
    print(arguments.output)


def run_section(name: str, setting: Setting, arguments: argparse.Namespace) -> None:
    """Measure a section; its file holds all rows so far at any moment."""
    about = environment() | {"section": name, "device": str(setting.device), "settings": vars(arguments)}
    file = arguments.output / f"{name}.json"
    rows: list[Row] = []
    start_s = perf_counter()
    write(file, about | {"finished": False, "rows": rows})
    for row in SECTIONS[name](setting):
        rows.append(row)
        write(file, about | {"finished": False, "rows": rows})
        print(f"{name}: " + ", ".join(f"{key} {shown(key, value)}" for key, value in row.items()), flush=True)
    write(file, about | {"finished": True, "seconds": round(perf_counter() - start_s, 1), "rows": rows})


def write(file: Path, result: dict[str, Any]) -> None:
    """Put the file in the place of the one before it, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(result, default=str) + "\n", encoding="utf-8")
    beside.replace(file)


def shown(key: str, value: object) -> str:
    """A value for a person."""
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value / GIB:.3f} GiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it works: numbers mean nothing")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=480, help="no measurement is begun later than this")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="a directory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
