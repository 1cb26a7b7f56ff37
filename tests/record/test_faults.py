"""Disks that are full, at every call that needs space; and the fault layer itself, which benchmarks/kill.py uses."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faulty_disk import FaultyDisk
from helpers import tiny_checkpoint

from agzo_edge.config import RunConfig, config_from
from agzo_edge.errors import AdapterError, AgzoError
from agzo_edge.events import Stepped
from agzo_edge.record.adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from agzo_edge.record.bases import WindowBases, bases_path, load_bases, save_bases
from agzo_edge.record.files import atomic_write_bytes, make_directory
from agzo_edge.record.journal import read_journal
from agzo_edge.record.tensors import checked_bytes, read_checked
from agzo_edge.rundir import JOURNAL_NAME
from agzo_edge.session import training

STEPS = 3  # a window of two and one left open, with a checkpoint in between


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory in memory where there is one: these tests sync thousands of times."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name).resolve()


def config_of(folder: Path) -> RunConfig:
    """A run of a moment on a random Llama, with everything that a run writes."""
    data = folder / "data.jsonl"
    rows = [{"prompt": f"{i} is ", "completion": "odd" if i % 2 else "even"} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = {"max_steps": STEPS, "refresh_every": 2, "batch_size": 2, "rank": 2, "mu": 0.01, "max_seq_length": 32}
    often = {"save_steps": 2, "eval_steps": 2, "eval_data": str(data), "data": str(data)}
    model = {"model": tiny_checkpoint("llama", num_hidden_layers=1), "device": "cpu", "load_in_4bit": True}
    return config_from(small, often, model, {"output_dir": str(folder / "run")})


def trained(config: RunConfig, *, resume: bool = False) -> Iterator[int]:
    """The steps that a run tells."""
    for event in training(config, resume=resume):
        if isinstance(event, Stepped):
            yield event.timed.record.step


def test_a_disk_that_is_full_from_any_call_on_stops_the_run_and_loses_nothing(folder: Path) -> None:
    config, run = config_of(folder), folder / "run"
    with FaultyDisk(folder, "full", at_call=None, generator=random.Random(0)) as disk:
        assert list(trained(config)) == [0, 1, 2]
    whole = (run / WEIGHTS_NAME).read_bytes()
    for call in range(disk.calls):
        shutil.rmtree(run)
        told: list[int] = []
        with (
            FaultyDisk(folder, "full", at_call=call, generator=random.Random(call)),
            pytest.raises(AgzoError, match=r"cannot be written: No space left on device.*intact; free space"),
        ):
            told.extend(trained(config))
        if (run / JOURNAL_NAME).exists():
            assert read_journal(run / JOURNAL_NAME).next_step >= len(told)
        for adapter in run.glob(f"**/{CONFIG_NAME}"):
            load_adapter(adapter.parent)
        again = list(trained(config, resume=True))
        assert again == list(range(STEPS - len(again), STEPS))
        assert not set(again) & set(told), "a told step was done again"
        assert (run / WEIGHTS_NAME).read_bytes() == whole


def test_power_that_goes_before_a_sync_may_take_a_file_and_never_after_it(folder: Path) -> None:
    kept = set()
    for seed in range(12):
        for synced in (False, True):
            place = folder / f"{seed}-{synced}"
            place.mkdir()
            if (child := os.fork()) == 0:
                _write_and_lose_power(place, seed=seed, synced=synced)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
            found = (place / "new" / "a").read_bytes() if (place / "new" / "a").exists() else None
            assert found == b"x" * 2000 if synced else True
            kept.add(found if synced else found == b"x" * 2000)
    assert {True, False} <= kept, "without the syncs it sometimes stays and sometimes goes"


def _write_and_lose_power(place: Path, *, seed: int, synced: bool) -> None:
    """A child's life and death."""
    try:
        with FaultyDisk(place, "power", at_call=12, generator=random.Random(seed)):
            if synced:
                make_directory(place / "new")
                atomic_write_bytes(place / "new" / "a", b"x" * 2000)
            else:
                (place / "new").mkdir()
                descriptor = os.open(place / "new" / "a", os.O_WRONLY | os.O_CREAT)
                os.write(descriptor, b"x" * 2000)
            for number in range(12):
                os.close(os.open(place / f"{number}", os.O_WRONLY | os.O_CREAT))
    finally:
        os._exit(0)


@pytest.mark.parametrize("at", [-1, -9, -300, 60])
def test_a_flipped_bit_in_a_checked_file_is_refused(tmp_path: Path, at: int) -> None:
    window = WindowBases({0: torch.randn(40, 2), 1: torch.randn(8, 2)}, [1.0, 2.0, 3.0])
    save_bases(tmp_path, 5, window)
    assert load_bases(tmp_path, 5, {"scales": (3,), "basis.0": (40, 2), "basis.1": (8, 2)}).scales == [1.0, 2.0, 3.0]
    data = bytearray(bases_path(tmp_path, 5).read_bytes())
    data[at] ^= 1
    bases_path(tmp_path, 5).write_bytes(data)
    with pytest.raises(AdapterError, match=r"checksum|cannot be read"):
        load_bases(tmp_path, 5, {"scales": (3,), "basis.0": (40, 2), "basis.1": (8, 2)})


def test_a_file_without_a_checksum_is_no_checked_file(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "empty": torch.zeros(0, 4), "number": torch.tensor(2.0, dtype=torch.bfloat16)}
    (tmp_path / "a").write_bytes(checked_bytes(tensors))
    assert read_checked(tmp_path / "a").keys() == tensors.keys()
    (tmp_path / "b").write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(AdapterError, match="checksum"):
        read_checked(tmp_path / "b")
