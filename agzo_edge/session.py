"""A run from its configuration to its last file, told as events.

Everything that can be refused is refused before anything is written: the plan, the data, the model, the
adapter to start from, the run to resume. After that, a step is on the disk before it is told.
"""

import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agzo_edge import demo
from agzo_edge.account import Account
from agzo_edge.budget.facts import model_facts
from agzo_edge.config import RunConfig, Sampling
from agzo_edge.errors import BudgetBrokenError, ConfigError, DataError, NonFiniteLossError, RewardError
from agzo_edge.evaluations import Evaluations
from agzo_edge.events import (
    DataReady,
    Event,
    Finished,
    ModelReady,
    Moved,
    MuChosen,
    Run,
    Saved,
    Stepped,
    WentBack,
)
from agzo_edge.footprint import Footprint
from agzo_edge.model.branch import cut_to, set_learned
from agzo_edge.model.device import chosen_device
from agzo_edge.model.load import load_model
from agzo_edge.model.memory import expect_outside_torch, refused_as_budget
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.lowrank import LowRank
from agzo_edge.paths import lasting
from agzo_edge.preparation import on_adapters_layers, planned_run, run_data
from agzo_edge.rebuild import bring_up_to, compute_as_begun
from agzo_edge.record.files import writing
from agzo_edge.record.journal import JournalWriter
from agzo_edge.record.lock import RunLock
from agzo_edge.rundir import (
    BEST_NAME,
    JOURNAL_NAME,
    STATE_NAME,
    checkpoint_path,
    discard_halves,
    header_of,
    keep_step,
    kept_evaluations,
    load_changes,
    read_run,
    require_same_run,
    require_unused,
    save_checkpoint,
    save_result,
    withdraw_report,
    write_report,
)
from agzo_edge.scalars import require_tensorboard, with_tensorboard
from agzo_edge.serve.dequantized import save_dense_model
from agzo_edge.serve.generate import TextModel
from agzo_edge.train.goal import goal_of
from agzo_edge.train.guard import Guard
from agzo_edge.train.learner import Learner
from agzo_edge.train.loop import probed_mu, rehearse, require_finite, run_steps
from agzo_edge.train.objective import Goal
from agzo_edge.train.reward import REWARD_MU, refused_as_data

SAMPLE = Sampling(max_new_tokens=48)
MERGED_NAME = "merged"  # with target = dequantized: the whole model as it is now


def training(config: RunConfig, *, resume: bool = False) -> Generator[Event]:
    """Train as `config` says; the demo answers a few held-out questions before and after.

    Closing the iterator stops the run after the step under way: a checkpoint is saved, and `resume` goes on
    from there. Raises the errors of errors.py; nothing is written before the first step can run.
    """
    needed = {"--model": config.model, "--data": config.data, "--output-dir": config.output_dir}
    if missing := [flag for flag, value in needed.items() if value is None]:
        raise ConfigError(f"a run needs {' and '.join(missing)} as well; without a model and data the demo runs")
    if config.report_to == "tensorboard":
        require_tensorboard()
    out = Path(str(config.output_dir))
    found = (out / JOURNAL_NAME).exists()
    to_know = (f"there is nothing to resume in {out}: this is a new run",) if resume and not found else ()
    resume = resume and found  # a run killed before its first step begins again
    if not resume:
        require_unused(out)
    named = {name: getattr(config, name) for name in ("model", "data", "eval_data", "adapter")}
    config = config.model_copy(update={name: place and lasting(place) for name, place in named.items()})
    facts = model_facts(str(config.model))  # first of all: a model that is not there is refused at once
    changes = _starting_changes(config, out) if config.adapter else {}
    config = on_adapters_layers(config, changes, facts)
    facts.require_trainable(config.target_modules)
    data, held_out = run_data(config, facts)
    if resume and held_out and kept_evaluations(out, data_sha256=held_out.sha256) is None:
        to_know = (*to_know, "the held-out rows are others than before: what was found on those is set aside")
    passes = config.max_steps * config.batch_size / len(data.examples)
    yield DataReady(data.report, held_out.report if held_out else None, data.sample, data.asking, passes)
    planned = planned_run(config, facts, [part for part in (data, held_out) if part], to_know=to_know)
    yield planned
    config = planned.config
    widest = max((change.rank for change in changes.values()), default=0)
    if widest > config.adapter_rank:
        raise ConfigError(
            f"the adapter to start from has rank {widest}, and adapter_rank is {config.adapter_rank}: it would be "
            f"cut down; use --adapter-rank {widest}"
        )
    device = chosen_device(config.device)
    expect_outside_torch(device, planned.plan.bytes_of("context"))
    with refused_as_budget(planned.plan):
        footprint = Footprint(device)
        model = load_model(str(config.model), config)
    footprint.mark()
    longest = max(part.report.longest_tokens for part in (data, held_out) if part)
    model.require_positions(longest + config.written_tokens)
    set_learned(model.branches, changes)
    samples = demo.PROMPTS if config.model == str(demo.MODEL_DIR) else ()
    account = Account(config, planned, data, held_out, model.quantization, footprint)
    guard = Guard(model, planned.rungs)
    with closing(goal_of(config)) as goal:
        evaluations = Evaluations(guard, model, goal, held_out, account.evaluations, out)
        session = _Session(config, account, evaluations, model, goal, samples, out, guard)
        events = session.resumed() if resume else session.begun()
        yield from with_tensorboard(events, out) if config.report_to == "tensorboard" else events


@dataclass
class _Session:
    """A run whose parts are all there."""

    config: RunConfig
    account: Account
    evaluations: Evaluations
    model: EdgeModel
    goal: Goal
    samples: Sequence[str]
    out: Path
    guard: Guard

    def begun(self) -> Generator[Event]:
        """A run from its first step."""
        yield self._ready(0)
        with refused_as_data():
            yield from self._rehearsed(0)
            self.guard.run(partial(require_finite, self.model, self.account.data, goal=self.goal))
            yield from self.evaluations.made(0)
        answers = self._answers()
        mu = self.config.mu
        if self.config.difference == "exact":
            mu = 1.0  # the tangent itself is carried, there is no perturbation to size
        if mu == "auto" and self.config.objective == "reward":
            mu = REWARD_MU
        if mu == "auto":
            probe = self.guard.run(partial(probed_mu, self.model, self.account.data, goal=self.goal))
            mu = probe.mu
            yield MuChosen(probe)
        header = header_of(self.config, self.model, self.account.data, mu=mu) | {"answers": answers}
        with RunLock(self.out):
            require_unused(self.out)  # another process may have been there while this one loaded
            learner = Learner(self.model.branches, self.config)
            with JournalWriter.create(self.out / JOURNAL_NAME, header) as journal:
                self.evaluations.keep()
                yield from self._trained(learner, journal, header, mu=mu)
            yield from self._finished(learner, header, answers)

    def resumed(self) -> Generator[Event]:
        """A run from its last completed step."""
        with RunLock(self.out):
            begun = read_run(self.out)
            header = begun.header
            now = header_of(self.config, self.model, self.account.data, mu=header["mu"])
            require_same_run(header, now, directory=self.out)
            compute_as_begun(header)
            header = header | {"config": header["config"] | {"model": self.config.model}}  # it may have been moved
            discard_halves(self.out)
            self.evaluations.take_up()
            self.account.take_records(begun.records)
            yield from self._rehearsed(begun.next_step)
            learner = Learner(self.model.branches, self.config)
            first_step = bring_up_to(learner, self.out, begun)
            yield self._ready(first_step)
            if self.evaluations.is_due(first_step):  # unless the stop came after it
                yield from self.evaluations.made(first_step, partial(self._save_best, learner, header))
            withdraw_report(self.out)
            with JournalWriter.resume(self.out / JOURNAL_NAME) as journal:
                yield from self._trained(learner, journal, header, mu=header["mu"])
            yield from self._finished(learner, header, header["answers"])

    def _trained(
        self, learner: Learner, journal: JournalWriter, header: Mapping[str, Any], *, mu: float
    ) -> Generator[Event]:
        """The steps from the journal's end on; a stop asked for in between leaves a checkpoint."""
        done = journal.next_step
        save_best = partial(self._save_best, learner, header)
        rate_factor = learner.rate_factor  # as the journal tells it
        if done == 0 and self.config.adapter:  # a replay must know what the run began with
            save_checkpoint(self.out, learner, header, step=0, card=self.account.card())
        if self.evaluations.should_stop():
            return
        try:
            for timed in run_steps(
                self.model,
                learner,
                self.account.data,
                guard=self.guard,
                mu=mu,
                goal=self.goal,
                first_step=journal.next_step,
                last_loss=self.account.last_loss,
            ):
                keep_step(self.out, journal, timed, learner)
                rate_factor = learner.rate_factor
                self.account.take(timed)
                begun_at, done = done, timed.record.step + 1  # before anything is told: whoever listens may end the run
                yield from (Moved(begun_at, what) for what in timed.moves)
                if timed.record.went_back_to is not None:
                    yield WentBack(begun_at, timed.record.went_back_to, timed.record.learning_rate)
                yield Stepped(timed)
                if timed.record.ended_at is not None:
                    yield WentBack(done, timed.record.ended_at, 0.0)
                if self.evaluations.is_due(done):
                    yield from self.evaluations.made(done, save_best)
                if self.evaluations.should_stop():
                    return
                if _is_due(done, self.config.save_steps) and done < self.config.max_steps:
                    yield Saved(done, save_checkpoint(self.out, learner, header, step=done, card=self.account.card()))
        except (GeneratorExit, BudgetBrokenError, DataError, NonFiniteLossError, RewardError) as error:
            if learner.rate_factor == rate_factor:  # else it has gone back for a step that failed, and no line says so
                save_checkpoint(self.out, learner, header, step=done, card=self.account.card())
            if isinstance(error, RewardError):
                raise RewardError(f"{error}. What was learned is saved: go on with --resume-from-checkpoint") from None
            raise

    def _finished(self, learner: Learner, header: Mapping[str, Any], answers: list[str]) -> Generator[Event]:
        """The result on the disk, the last evaluation, and the report."""
        self.account.footprint.mark()
        last = self.account.steps  # fewer than max_steps where the run has stopped early
        yield from self.evaluations.made(last, partial(self._save_best, learner, header))
        files = tokenizer_files(self.model.tokenizer, self.out)
        save_result(self.out, learner, header, card=self.account.card(), extra_files=files)
        if self.config.target == "dequantized":
            shutil.rmtree(self.out / MERGED_NAME, ignore_errors=True)  # of a run that was killed here, or made longer
            save_dense_model(self.model, self.out / MERGED_NAME)
        yield Saved(last, self.out)
        told = zip(self.samples, answers, self._answers() if answers else [], strict=False)
        report = self.account.report(
            [{"prompt": prompt, "before": before, "after": after} for prompt, before, after in told]
        )
        write_report(self.out, report)
        yield Finished(Run(self.out, self.account.before, self.account.after, report))

    def _rehearsed(self, first_step: int) -> Generator[Event]:
        """The worst batch first: what it moves to a lower rung is told."""
        rehearse(self.model, self.account.data, guard=self.guard, goal=self.goal)
        yield from (Moved(first_step, what) for what in self.guard.take_moves())

    def _ready(self, first_step: int) -> ModelReady:
        return ModelReady(
            source=self.model.source,
            n_layers=len(self.model.branches),
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            quantization=self.model.quantization,
            first_step=first_step,
        )

    def _save_best(self, learner: Learner, header: Mapping[str, Any]) -> None:
        save_result(self.out / BEST_NAME, learner, header, card=self.account.card())

    def _answers(self) -> list[str]:
        asking = self.account.data.asking
        writer = TextModel(self.model, form=asking.form if asking else None)
        with cut_to(self.model.branches, self.config.adapter_rank):
            return [writer.generate(prompt, sampling=SAMPLE) for prompt in self.samples]


def _starting_changes(config: RunConfig, out: Path) -> Mapping[str, LowRank]:
    """Those of the adapter to begin with; nothing where it is gone and the run to resume has them in a checkpoint."""
    adapter = Path(str(config.adapter))
    is_kept = (checkpoint_path(out, 0) / STATE_NAME).is_file()  # only of a run that is there to be resumed
    return {} if is_kept and not adapter.exists() else load_changes(adapter)


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def tokenizer_files(tokenizer: Any, out: Path) -> dict[str, bytes]:
    """The tokenizer's files by name, so that the adapter's directory is complete; written inside it for a moment."""
    with writing(out), TemporaryDirectory(prefix=".tokenizer-", dir=out) as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
