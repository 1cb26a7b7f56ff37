"""What a run tells of itself: the model card and the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from agzo_edge import __version__
from agzo_edge.config import RunConfig
from agzo_edge.events import Planned
from agzo_edge.footprint import Footprint
from agzo_edge.record.card import model_card
from agzo_edge.train.best import best_step
from agzo_edge.train.data import ExampleSet
from agzo_edge.train.evaluate import Metrics
from agzo_edge.train.loop import TimedStep

_TOLD_SETTINGS = (
    *("rank", "guide", "adapter_rank", "refresh_every", "noise", "difference"),
    *("optimizer", "learning_rate", "batch_size"),
)


@dataclass
class Account:
    """The sums of a run, over all its sittings."""

    config: RunConfig
    planned: Planned
    data: ExampleSet
    held_out: ExampleSet | None
    quantization: str  # the base's form in a word
    footprint: Footprint
    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    peak_bytes: int = 0
    last_loss: float = -math.inf  # of the last step
    times_gone_back: int = 0
    steps_without_signal: int = 0  # in which no loss had changed with the noise's sign
    evaluations: dict[int, Metrics] = field(default_factory=dict)

    def take(self, timed: TimedStep) -> None:
        """Add a step."""
        self._add(timed.tokens, timed.wall_s, timed.peak_bytes)
        self.last_loss = timed.record.loss
        self.times_gone_back += (timed.record.went_back_to is not None) + (timed.record.ended_at is not None)
        self.steps_without_signal += not any(timed.record.projected)

    def take_records(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the steps of earlier sittings, from the journal."""
        for record in records:
            self._add(int(record["tokens"]), float(record["wall_s"]), int(record["peak_bytes"]))
            self.last_loss = float(record["loss"])
            self.times_gone_back += ("went_back_to" in record) + ("ended_at" in record)
            self.steps_without_signal += not any(record["projected"])

    def _add(self, tokens: int, wall_s: float, peak_bytes: int) -> None:
        self.steps += 1
        self.tokens += tokens
        self.wall_s += wall_s
        self.peak_bytes = max(self.peak_bytes, peak_bytes)

    @property
    def before(self) -> Metrics | None:
        """The evaluation of the model as it began, if there is one and a later one."""
        return self.evaluations.get(0) if len(self.evaluations) > 1 else None

    @property
    def after(self) -> Metrics | None:
        """The last evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    def card(self) -> str:
        """README.md of the adapter as it is now."""
        before, after = self.before, self.after if self.before else None
        is_loss = self.config.objective != "reward"
        return model_card(
            {
                "base_model": self.config.model,
                "quantization": self.quantization,
                "data_file": self.config.data,
                "data_sha256": self.data.sha256,
                "prompt_form": self.data.asking and self.data.asking.form,
                "n_rows": self.data.report.rows_used - self.data.report.rows_held_back,
                "eval_file": self.config.eval_data,
                "n_eval_rows": self.held_out and self.held_out.report.rows_used,
                "settings": {name: getattr(self.config, name) for name in _TOLD_SETTINGS},
                "steps": self.steps,
                "n_tokens": self.tokens,
                "loss_before": before and before.loss if is_loss else None,
                "loss_after": after and after.loss if is_loss else None,
                "reward_before": before and before.reward,
                "reward_after": after and after.reward,
                "accuracy_before": before and before.accuracy,
                "accuracy_after": after and after.accuracy,
                "wall_s": self.wall_s,
                "peak_bytes": self.peak_bytes or None,
                "limit_bytes": self.planned.plan.limit_bytes,
                "device": self.planned.machine,
                "seed": self.config.seed,
                "version": __version__,
            }
        )

    def report(self, samples: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "model": self.config.model,
            "finished": True,
            "steps": self.steps,
            "times_gone_back": self.times_gone_back,
            "steps_without_signal": self.steps_without_signal,
            "wall_s": round(self.wall_s, 3),
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens / self.wall_s, 1) if self.wall_s else None,
            "predicted_peak_bytes": self.planned.plan.device_bytes,
            "measured_peak_bytes": self.peak_bytes or None,
            "limit_bytes": self.planned.plan.limit_bytes,
            "memory": self.footprint.report(self.planned.plan, peak_bytes=self.peak_bytes),
            "data": asdict(self.data.report),
            "held_out_data": asdict(self.held_out.report) if self.held_out else None,
            "best_step": best_step(self.evaluations, self.config.metric_for_best_model),
            "evaluations": {str(step): metrics.as_json() for step, metrics in sorted(self.evaluations.items())},
            "samples": list(samples),
        }
