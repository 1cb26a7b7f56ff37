"""The guard: real allocations against real limits."""

import weakref
from dataclasses import replace

import pytest
import torch
from helpers import run_config, tiny_model, unlimited

from agzo_edge.budget.plan import Rung
from agzo_edge.config import RunConfig
from agzo_edge.errors import BudgetBrokenError, BudgetError
from agzo_edge.model.memory import anonymous_bytes
from agzo_edge.train.guard import PATIENCE_STEPS, Guard
from agzo_edge.units import MIB

ROOM = 200 * MIB  # of the limits below, beyond what the process has


def guard_of(*, room: int = ROOM, planned: tuple[int, ...] = (160, 80, 20)) -> Guard:
    """A guard with rungs of micro-batches of 8, 4, 2, planned to take so many MiB beyond the present."""
    config = run_config(batch_size=8)
    unguarded = unlimited(tiny_model(), config)
    base, template = anonymous_bytes(), unguarded.rungs[0].plan
    rungs = []
    for i, mib in enumerate(planned):
        part = replace(template.components[0], n_bytes=base + mib * MIB)
        plan = replace(template, components=(part,), limit_bytes=base + room)
        rungs.append(Rung(config.model_copy(update={"micro_batch_size": 8 >> i}), plan))
    return Guard(unguarded.model, rungs)


def touch(mib: int) -> None:
    torch.ones(mib * MIB // 4)


def takes(config: RunConfig, *, mib_of: dict[int, int]) -> int:
    """Work that takes so many MiB on each rung; the rung that it was done on."""
    assert config.micro_batch_size is not None
    touch(mib_of[config.micro_batch_size])
    return config.micro_batch_size


def test_work_that_fits_is_done_once_where_it_was_planned() -> None:
    guard = guard_of()
    calls: list[int] = []
    assert guard.run(lambda config: calls.append(takes(config, mib_of={8: 100}))) is None
    assert calls == [8]
    assert guard.take_moves() == ()
    assert guard.peak_bytes > guard.limit_bytes - ROOM + 90 * MIB


def test_work_that_meets_the_limit_is_done_again_a_rung_down_and_stays_there() -> None:
    guard = guard_of()
    assert guard.run(lambda config: takes(config, mib_of={8: 400, 4: 300, 2: 50})) == 2
    first, second = guard.take_moves()
    assert first.startswith("micro-batches of 4: it met the limit of")
    assert second.startswith("micro-batches of 2: it met the limit of")
    for _ in range(2 * PATIENCE_STEPS):  # what never fits is not tried again
        assert guard.run(lambda config: takes(config, mib_of={8: 400, 4: 300, 2: 50})) == 2
    assert guard.take_moves() == ()


def test_work_that_fits_nowhere_ends_the_run_with_what_to_do() -> None:
    guard = guard_of()
    guard.has_begun = True
    with pytest.raises(BudgetBrokenError, match=r"(?s)no smaller way.*--on-overflow stream"):
        guard.run(lambda config: takes(config, mib_of={8: 400, 4: 400, 2: 400}))


def test_work_that_failed_has_let_its_memory_go_when_it_is_done_again() -> None:
    guard = guard_of()
    held: list[weakref.ref[torch.Tensor]] = []

    def work(config: RunConfig) -> bool:
        if config.micro_batch_size != 8:
            return held[0]() is not None
        layer = torch.ones(30 * MIB // 4)
        held.append(weakref.ref(layer))
        touch(400)
        return False

    assert not guard.run(work)


def test_every_move_gives_back_what_the_rung_before_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, given_back = guard_of(), []
    monkeypatch.setattr("agzo_edge.model.offload.give_back", given_back.append)
    guard.run(lambda config: takes(config, mib_of={8: 400, 4: 100}))
    assert given_back == [guard.model.device]


def test_a_rehearsal_that_fits_nowhere_is_a_refusal() -> None:
    with pytest.raises(BudgetError, match="Nothing was learned; try --on-overflow stream"):
        guard_of().rehearse(lambda config: takes(config, mib_of={8: 400, 4: 400, 2: 400}))


def test_a_rehearsal_ends_on_the_first_rung_that_holds() -> None:
    guard = guard_of()
    guard.rehearse(lambda config: takes(config, mib_of={8: 400, 4: 100}))
    assert guard.config.micro_batch_size == 4


def test_memory_that_others_take_moves_the_run_down_and_memory_that_comes_back_up_again() -> None:
    guard = guard_of(room=500 * MIB)
    work = {8: 150, 4: 60, 2: 10}
    others, guard._spare_bytes = guard._spare_bytes, 2**60  # as if others had taken everything
    assert guard.run(lambda config: takes(config, mib_of=work)) == 2
    assert "only 0 B are left" in guard.take_moves()[0]
    guard._spare_bytes = others
    on = [guard.run(lambda config: takes(config, mib_of=work)) for _ in range(PATIENCE_STEPS)]
    assert on == [2] * (PATIENCE_STEPS - 1) + [8]
    assert "are free for it again" in guard.take_moves()[0]


def test_how_wrong_a_plan_has_been_is_remembered_on_other_rungs() -> None:
    guard = guard_of(room=500 * MIB, planned=(40, 30, 20))
    assert guard.run(lambda config: takes(config, mib_of={8: 200})) == 8
    guard._spare_bytes = 2**60  # as if others had taken everything
    assert guard.run(lambda config: takes(config, mib_of={2: 10})) == 2
    between = guard.rungs[1].plan.device_bytes
    assert guard._need(1) > between + 50 * MIB


def test_other_errors_come_out_as_they_are_and_move_nothing() -> None:
    guard = guard_of()
    with pytest.raises(ValueError, match="mine"):
        guard.run(lambda _: (_ for _ in ()).throw(ValueError("mine")))
    assert guard.take_moves() == ()
