"""What the runs of the learning benchmark say: a line for each cell, the targets, and plots."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from learning_methods import Setup

Run = Mapping[str, Any]
Cell = tuple[str, str, str]  # model, base, task


def name_of(run: Run) -> str:
    """The method; `preset` for the default preset at its own rate."""
    return "preset" if run["setup"]["rate"] is None else str(run["setup"]["method"])


def by_cell(runs: Sequence[Run]) -> dict[Cell, dict[str, list[list[Run]]]]:
    """cell -> method -> runs at each rate, one for each seed; the rates from best to worst.

    Best is the lowest mean held-out loss at the end, among the rates that got the most seeds.
    """
    grouped: dict[Cell, dict[str, dict[float, list[Run]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in runs:
        setup = run["setup"]
        grouped[setup["source"], setup["base"], setup["task"]][name_of(run)][run["rate"]].append(run)
    return {
        cell: {
            method: sorted(rates.values(), key=lambda seeds: (-len(seeds), mean_end(seeds)))
            for method, rates in methods.items()
        }
        for cell, methods in grouped.items()
    }


def ends(seeds: Sequence[Run]) -> list[float]:
    """The held-out loss at the end of each run."""
    return [float(run["curve"][-1][1]) for run in seeds]


def mean_end(seeds: Sequence[Run]) -> float:
    """Their mean."""
    return statistics.mean(ends(seeds))


def spread_of(seeds: Sequence[Run]) -> float:
    """Their standard deviation; 0 for one seed."""
    return statistics.stdev(ends(seeds)) if len(seeds) > 1 else 0.0


def mean_curve(seeds: Sequence[Run]) -> list[tuple[int, float]]:
    """(forward passes, mean loss over the seeds) at each evaluation that all seeds reached."""
    setup = Setup(**{name: value for name, value in seeds[0]["setup"].items() if name != "task"})
    points = zip(*(run["curve"] for run in seeds), strict=False)
    return [(setup.forwards_after(at[0][0]), statistics.mean(point[1] for point in at)) for at in points]


def forwards_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Forward passes until the curve first meets `loss`, between evaluations by a straight line."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low) if high > loss else float(before)
    return None


def accuracy_of(seeds: Sequence[Run]) -> float | None:
    """The mean accuracy at the end; none for a language model."""
    found = [run["curve"][-1][2] for run in seeds]
    return None if None in found else statistics.mean(found)


def summary_of(runs: Sequence[Run], peaks: Mapping[str, int]) -> list[dict[str, Any]]:
    """A line for each cell and method, at its best rate."""
    return [
        _line(cell, method, rates, peaks)
        for cell, methods in by_cell(runs).items()
        for method, rates in methods.items()
    ]


def _line(cell: Cell, method: str, rates: list[list[Run]], peaks: Mapping[str, int]) -> dict[str, Any]:
    seeds = rates[0]
    model, base, task = cell
    accuracy = accuracy_of(seeds)
    peak = peaks.get(f"{model} {base} {task} {seeds[0]['setup']['method']}")
    return {
        "model": model,
        "base": base,
        "task": task,
        "method": method,
        "rate": f"{seeds[0]['rate']:.2g}",
        "seeds": len(seeds),
        "before": seeds[0]["curve"][0][1],
        "after": mean_end(seeds),
        "±": spread_of(seeds),
        "accuracy": "-" if accuracy is None else round(accuracy, 3),
        "forwards": mean_curve(seeds)[-1][0],
        "train s": statistics.median(run["train_s"] for run in seeds),
        "peak MiB": "-" if peak is None else round(peak / 2**20, 1),
    }


def targets_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The preset against the others' best, cell by cell, and over the pairs of model and text.

    Choices are left out of the medians: nobody learns them, and a ratio of nothing says nothing.
    """
    cells = {cell: methods for cell, methods in by_cell(runs).items() if "preset" in methods}
    lines = {cell: _targets(cell, methods) for cell, methods in cells.items()}
    texts = [line for cell, line in lines.items() if cells[cell]["preset"][0][0]["setup"]["objective"] == "lm"]
    over_texts = {}
    for name in ("forwards to paper's best", "forwards to mezo's best", "share of first-order's gain"):
        if found := [line[name] for line in texts if line.get(name) is not None]:
            over_texts[name] = {"least": min(found), "median": statistics.median(found), "most": max(found)}
    kept = [line["within spread of swept best"] for line in lines.values() if "within spread of swept best" in line]
    return {"cells": list(lines.values()), "over texts": over_texts, "within spread": f"{sum(kept)} of {len(kept)}"}


def _targets(cell: Cell, methods: Mapping[str, list[list[Run]]]) -> dict[str, Any]:
    """Of one cell: the default preset against the others' best."""
    preset = methods["preset"][0]
    curve = mean_curve(preset)
    line: dict[str, Any] = {"cell": " ".join(cell)}
    for other in ("paper", "mezo"):
        if other in methods:
            other_curve = mean_curve(methods[other][0])
            best, at = min((loss, forwards) for forwards, loss in other_curve)
            reached = forwards_to_reach(curve, best)
            line[f"forwards to {other}'s best"] = None if reached is None else reached / max(at, 1)
    if "first-order" in methods:
        start, end = curve[0][1], mean_end(methods["first-order"][0])
        line["share of first-order's gain"] = (start - mean_end(preset)) / (start - end)
    if "default" in methods:
        swept = methods["default"][0]
        allowed = max(spread_of(swept), spread_of(preset))
        line["within spread of swept best"] = mean_end(preset) <= mean_end(swept) + allowed
    return line


def write_plots(runs: Sequence[Run], folder: Path) -> None:
    """A picture for each cell: held-out loss against forward passes, each method at its best rate, in `folder`."""
    import matplotlib  # an extra, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for cell, methods in by_cell(runs).items():
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        for method, rates in methods.items():
            curve = np.array(mean_curve(rates[0]))
            losses = np.array([[point[1] for point in run["curve"][: len(curve)]] for run in rates[0]])
            (line,) = axes.plot(*curve.T, label=f"{method} ({rates[0][0]['rate']:.2g})", linewidth=1.4)
            axes.fill_between(curve[:, 0], losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15)
        first = curve[0, 1]
        axes.set(xlabel="forward passes of 16 examples", ylabel="held-out loss", title=" ".join(cell))
        axes.set_ylim(top=first + 0.15 * abs(first))
        axes.legend(fontsize=8)
        figure.savefig(folder / f"{'-'.join(cell)}.svg")
        plt.close(figure)
