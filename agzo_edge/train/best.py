"""Which evaluation of a run was the best, and whether waiting for a better one has lasted long enough."""

import math
from collections.abc import Mapping

from agzo_edge.train.evaluate import Metrics

_LESS_IS_BETTER = ("loss",)


def best_step(evaluations: Mapping[int, Metrics], metric: str) -> int | None:
    """The step after which `metric` was best, the first of equals; the untrained model, step 0, does not count."""
    values = {step: _merit(metrics, metric) for step, metrics in evaluations.items() if step > 0}
    return max(sorted(values), key=lambda step: values[step]) if values else None


def out_of_patience(evaluations: Mapping[int, Metrics], metric: str, *, patience: int) -> bool:
    """Whether the last `patience` evaluations have not been better than one before them; never for 0."""
    steps = sorted(evaluations)
    if patience == 0 or len(steps) <= patience:
        return False
    merits = [_merit(evaluations[step], metric) for step in steps]
    return max(merits[-patience:]) <= max(merits[:-patience])


def _merit(metrics: Metrics, metric: str) -> float:
    """The metric, larger the better; what is not finite is the worst."""
    value = getattr(metrics, metric)
    assert value is not None, f"{metric} is no metric of this objective"
    merit = -float(value) if metric in _LESS_IS_BETTER else float(value)
    return merit if math.isfinite(merit) else -math.inf
