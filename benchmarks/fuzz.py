"""Damaged and forged files through every reader: an error for a person, or a right read.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py [--quick] [--cases 100000] [--output FILE]

Each case changes one file of a small run or model, by seed and number, and reads it. What may come of it:

    refused      an error of errors.py, whose message can be printed
    same         what was written comes back, all of it
    as it says   of a journal its first steps and nothing else; where a file has no checksum (an adapter's
                 tensors and configuration as PEFT has them, evaluations, a model), another value, and a reader
                 of our own here finds that same value in the file; a journal forged with right checksums

and what may not: `wrong` (another value that is not what the file says, or that a checksum should have told),
`exception` (any other error, or a message that cannot be printed) and `hang` (over 2 seconds).
"""

import copy
import dataclasses
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from environment import ROOT, environment, leave_result, parser_of

sys.path.append(str(ROOT / "tests"))

import torch
from kill import references
from torch import Tensor

from agzo_edge.budget.facts import ModelFacts, facts_of
from agzo_edge.budget.headers import read_checkpoint
from agzo_edge.errors import AgzoError
from agzo_edge.rebuild import bring_up_to, learner_of, rebuilt, replay_file_of, window_shapes
from agzo_edge.record.adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from agzo_edge.record.bases import bases_path, load_bases
from agzo_edge.record.journal import Journal, read_journal
from agzo_edge.record.replay_file import load_replay, save_replay
from agzo_edge.rundir import (
    EVALUATIONS_NAME,
    JOURNAL_NAME,
    STATE_NAME,
    checkpoint_path,
    checkpoint_steps,
    kept_evaluations,
    read_run,
)
from agzo_edge.train.evaluate import Metrics

HANG_S = 2.0
MEMORY_BYTES = 2 * 1024**3  # over what the process has at the start: a forged shape must not take the machine
OUTCOMES = ("refused", "same", "as it says", "wrong", "exception", "hang")
BAD = OUTCOMES[3:]
HUGE = "@huge@"  # stands for a number longer than json.dumps writes
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(1e300, -1e-300, float("nan"), float("inf"), 10**300, HUGE, "", "x", "x" * 3000, "\ud800", "\x1b[2J", "[[a"),
    *("(a+)+$", "../../etc/passwd", "/etc/passwd", "1", "é", [], {}, [[]], [0], [-1], [0, 2**63], {"a": {}}),
    *([2**40, 2**40], ["x"], "F32", "I8", "BF16", "F4", [0, 0], [2**62, 4], [1] * 70),
)
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
NUMBERS = (b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"1e-400", b"18446744073709551615", b"NaN", b"-0", b"1.5")
Mutate = Callable[[bytes, random.Random], bytes]


class Hang(BaseException):
    """A case took too long; no reader may catch it."""


@dataclass(frozen=True)
class Subject:
    """A file, a way to damage it, and its reader."""

    name: str
    path: Path
    mutate: Mutate
    read: Callable[[], Any]
    says: Callable[[bytes, Any], bool]  # whether a file of these bytes says that value
    share: int  # of 100 cases


# Damage


def scratched(data: bytes, generator: random.Random) -> bytes:
    """`data` with one to three wounds of a disk, a cable or a bad copy."""
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        data = generator.choice(WOUNDS)(data, generator)
    return data


def _span(data: bytes, generator: random.Random) -> tuple[int, int]:
    start = generator.randrange(len(data) + 1)
    return start, min(len(data), start + generator.choice((1, 2, 8, 64, 512, 4096)))


def _flipped(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 8)) if data else 0):
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _cut(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data) + 1)]


def _without(data: bytes, generator: random.Random) -> bytes:
    start, end = _span(data, generator)
    return data[:start] + data[end:]


def _twice(data: bytes, generator: random.Random) -> bytes:
    start, end = _span(data, generator)
    return data[:end] + data[start:]


def _filled(data: bytes, generator: random.Random) -> bytes:
    start, end = _span(data, generator)
    filling = generator.choice((b"\0" * (end - start), b"\xff" * (end - start), generator.randbytes(end - start)))
    return data[:start] + filling + data[end:]


def _swapped(data: bytes, generator: random.Random) -> bytes:
    cuts = sorted(generator.randrange(len(data) + 1) for _ in range(3))
    return data[: cuts[0]] + data[cuts[1] : cuts[2]] + data[cuts[0] : cuts[1]] + data[cuts[2] :]


def _grown(data: bytes, generator: random.Random) -> bytes:
    start, _ = _span(data, generator)
    growth = generator.choice((generator.randbytes(9), b"\n", b"\0" * 600, *NUMBERS))
    return data[:start] + growth + data[start:]


def _renumbered(data: bytes, generator: random.Random) -> bytes:
    places = list(NUMBER.finditer(data[:65536]))
    if not places:
        return data
    place = generator.choice(places)
    return data[: place.start()] + generator.choice(NUMBERS) + data[place.end() :]


def _with_a_line_moved(data: bytes, generator: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    if lines:
        line = lines.pop(generator.randrange(len(lines)))
        if generator.random() < 0.5:  # it moves
            lines.insert(generator.randrange(len(lines) + 1), line)
    return b"".join(lines)


WOUNDS: tuple[Mutate, ...] = (
    *(_flipped, _flipped, _cut, _without, _twice, _filled, _swapped, _grown, _renumbered, _with_a_line_moved),
)


def forged(text: bytes, generator: random.Random) -> bytes:
    """JSON text with one to three values replaced, removed, or given twice."""
    value = json.loads(text)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        _forge(value, generator)
    written = json.dumps(value).replace(f'"{HUGE}"', "9" * 6000)
    if isinstance(value, dict) and value and generator.random() < 0.05:
        key = generator.choice(list(value))
        written = written[:-1] + f", {json.dumps(key)}: 1}}"
    if generator.random() < 0.02:
        written = written[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"
    return written.encode("utf-8", "surrogatepass")


def _forge(value: Any, generator: random.Random) -> None:
    """Change something somewhere inside `value`."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = generator.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and generator.random() < 0.8:
            value = value[key]
            continue
        how = generator.random()
        if how < 0.1:
            del value[key]
        elif how < 0.2 and isinstance(value, dict):
            value[str(generator.choice(STRANGE))[:400]] = value.pop(key)
        elif how < 0.3 and type(value[key]) is int:
            value[key] += generator.choice((-1, 1, 4, 8, 2**32))
        else:
            value[key] = copy.deepcopy(generator.choice(STRANGE))
        return


def scratched_or_forged(text: bytes, generator: random.Random) -> bytes:
    """JSON damaged as bytes or as a document."""
    return generator.choice((scratched, forged))(text, generator)


def with_bad_header(data: bytes, generator: random.Random) -> bytes:
    """A safetensors file whose header is damaged or forged, and its length with it, or not."""
    (length,) = struct.unpack("<Q", data[:8])
    header = scratched_or_forged(data[8 : 8 + length], generator)
    new_length = len(header)
    how = generator.random()
    if how < 0.2:
        new_length = length
    elif how < 0.3:
        new_length = generator.choice((0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1, len(data)))
    return struct.pack("<Q", new_length) + header + data[8 + length :]


def with_bad_tensors(data: bytes, generator: random.Random) -> bytes:
    """A safetensors file with other bytes in its tensors and all of its header."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    wound = generator.choice((_flipped, _filled, _swapped))
    return data[:start] + wound(data[start:], generator)


def scratched_safetensors(data: bytes, generator: random.Random) -> bytes:
    """A safetensors file with any damage, to the header half of the time."""
    return generator.choice((with_bad_header, scratched, with_bad_tensors))(data, generator)


def with_forged_line(data: bytes, generator: random.Random) -> bytes:
    """A journal of which somebody changed a line and set its checksum right."""
    lines = data.splitlines(keepends=True)
    number = generator.choice((0, generator.randrange(len(lines))))
    fields = json.loads(lines[number])
    del fields["crc"]
    body = forged(json.dumps(fields).encode(), generator)
    lines[number] = body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)
    return b"".join(lines)


# What a file says, told without the package


def plain_value(value: Any) -> Any:
    """`value` such that equal means equal to the last bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if dataclasses.is_dataclass(value):
        return plain_value(vars(value) if hasattr(value, "__dict__") else value)
    if isinstance(value, Mapping):
        return {key: plain_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(entry) for entry in value]
    return repr(value)


def plain_tensors(data: bytes) -> dict[str, Tensor]:
    """The float tensors of a safetensors file, by a reader of our own."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(data[begin:end]), dtype=kinds[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])
    return tensors


def says_pairs(config: bytes, weights: bytes, pairs: Any) -> bool:
    """Whether an adapter of these two files holds `pairs`."""
    fields, tensors = json.loads(config), plain_tensors(weights)

    def of(module: str, patterns: str, general: str) -> float:
        for pattern, value in (fields.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return fields[general]

    expected = {}
    for name in tensors:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name.endswith(".lora_A.weight"):
            rank, alpha = of(module, "rank_pattern", "r"), of(module, "alpha_pattern", "lora_alpha")
            b = tensors[name.replace(".lora_A.", ".lora_B.")].float()
            scaling = alpha / (rank**0.5 if fields.get("use_rslora") else rank)
            expected[module] = {"a": tensors[name].float(), "b": b * scaling}
    return plain_value(pairs) == plain_value(expected)


def says_first_steps(original: Journal) -> Callable[[bytes, Any], bool]:
    """Whether a journal is the original's beginning: every line has a checksum, nothing else may come back."""

    def says(data: bytes, journal: Journal) -> bool:
        return (
            repr(journal.header) == repr(original.header)
            and repr(journal.records) == repr(original.records[: len(journal.records)])
            and journal.sound_bytes + journal.torn_bytes == len(data)
        )

    return says


def says_never(_data: bytes, _value: Any) -> bool:
    """A checksum should have told."""
    return False


def says_evaluations(data: bytes, found: Any) -> bool:
    """Whether the JSON holds these evaluations, numbers where numbers belong."""
    written = {int(step): entry for step, entry in json.loads(data)["evaluations"].items()}
    typed = all(
        type(m.examples) is int and type(m.loss) in (int, float) and type(m.accuracy) in (int, float, type(None))
        for m in found.values()
    )
    unsaid = dataclasses.asdict(Metrics(examples=0, loss=0.0))  # what a file may leave out
    return typed and all(plain_value(m.as_json()) == plain_value(unsaid | written[s]) for s, m in found.items())


def says_facts(_data: bytes, facts: ModelFacts) -> bool:
    """Whether the facts can be reckoned with: natural numbers where numbers belong."""
    numbers = [getattr(facts, field.name) for field in dataclasses.fields(facts) if field.type is int]
    numbers += [side for shape in facts.linears.values() for side in shape]
    return all(type(number) is int and number >= 0 for number in numbers) and facts.n_parameters >= 0


def says_anything(_data: bytes, _value: Any) -> bool:
    """Somebody who set the checksums right may say what he likes; only the way of failing is looked at."""
    return True


# The files and their readers


def subjects(folder: Path) -> list[Subject]:
    """A small run's files and a small model's, in `folder`, with their readers."""
    references(folder)
    run, model = folder / "adam" / "run", folder / "model"
    journal = read_run(run)
    learner = learner_of(journal.header)
    shapes, step = window_shapes(learner), checkpoint_steps(run)[-1]
    empty = dataclasses.replace(journal, records=journal.records[:step])
    adapter = folder / "adapter"
    adapter.mkdir()
    config, weights = (folder / "momentum-on-an-adapter" / "run" / name for name in (CONFIG_NAME, WEIGHTS_NAME))
    fields = json.loads(config.read_bytes())
    fields |= {"alpha_pattern": {r"^model\.layers\.0": 3.0, "q_proj": 5}, "lora_alpha": 6}
    (adapter / CONFIG_NAME).write_text(json.dumps(fields, indent=2), encoding="utf-8")
    (adapter / WEIGHTS_NAME).write_bytes(weights.read_bytes())
    held_out_sha256 = json.loads((run / EVALUATIONS_NAME).read_bytes())["data_sha256"]
    replay_path = folder / "run.safetensors"
    save_replay(replay_path, replay_file_of(run))

    def state() -> Any:
        fresh = learner_of(journal.header)
        bring_up_to(fresh, run, empty)
        return fresh.state()

    def replayed() -> Any:
        found = read_run(run)
        fresh = learner_of(found.header)
        bring_up_to(fresh, run, found, from_start=True)
        return fresh.adapter()

    def config_says(data: bytes, pairs: Any) -> bool:
        return says_pairs(data, (adapter / WEIGHTS_NAME).read_bytes(), pairs)

    def weights_say(data: bytes, pairs: Any) -> bool:
        return says_pairs((adapter / CONFIG_NAME).read_bytes(), data, pairs)

    def facts() -> ModelFacts:
        return facts_of(read_checkpoint(model, source="a model"))

    def adapter_read() -> Any:
        return load_adapter(adapter)

    path = run / JOURNAL_NAME
    bases, state_path = bases_path(run, 3), checkpoint_path(run, step) / STATE_NAME
    return [
        Subject("journal", path, scratched, lambda: read_journal(path), says_first_steps(journal), 28),
        Subject("journal, forged, replayed", path, with_forged_line, replayed, says_anything, 6),
        Subject("bases", bases, scratched_safetensors, lambda: load_bases(run, 3, shapes), says_never, 16),
        Subject("learner state", state_path, scratched_safetensors, state, says_never, 8),
        Subject("adapter_config.json", adapter / CONFIG_NAME, scratched_or_forged, adapter_read, config_says, 10),
        Subject("adapter header", adapter / WEIGHTS_NAME, with_bad_header, adapter_read, weights_say, 12),
        Subject("adapter tensors", adapter / WEIGHTS_NAME, with_bad_tensors, adapter_read, weights_say, 2),
        Subject(
            "replay file",
            replay_path,
            scratched_safetensors,
            lambda: rebuilt(load_replay(replay_path)).adapter(),
            says_never,
            4,
        ),
        Subject(
            "evaluations.json",
            run / EVALUATIONS_NAME,
            scratched_or_forged,
            lambda: kept_evaluations(run, data_sha256=held_out_sha256) or {},  # none, too, where they are of other data
            says_evaluations,
            4,
        ),
        Subject("model config.json", model / "config.json", scratched_or_forged, facts, says_facts, 5),
        Subject("model header", model / "model.safetensors", with_bad_header, facts, says_facts, 5),
    ]


# The cases


@dataclass
class Tally:
    """What came of the cases of one subject."""

    outcomes: Counter[str]
    slowest_s: float = 0.0
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def outcome_of(subject: Subject, data: bytes, original: Any) -> tuple[str, str]:
    """What comes of reading `data` in the subject's place, and a word about it."""
    try:
        value = subject.read()
    except AgzoError as error:
        try:
            str(error).encode()
        except UnicodeEncodeError:
            return "exception", f"a message that cannot be printed: {str(error)!r}"
        return "refused", ""
    except Hang:
        return "hang", ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a Rust panic is no Exception
        return "exception", f"{type(error).__name__}: {str(error)[:300]}"
    if plain_value(value) == original:
        return "same", ""
    try:
        right = subject.says(data, value)
    except Exception as error:  # noqa: BLE001 - our own reader refuses what theirs takes
        return "wrong", f"read, and not readable here: {type(error).__name__}: {error}"
    return ("as it says" if right else "wrong"), ""


def tally_of(subject: Subject, count: int, *, seed: int) -> Tally:
    """`count` cases of one subject."""
    tally = Tally(Counter())
    before, original = subject.path.read_bytes(), plain_value(subject.read())
    for number in range(count):
        generator = random.Random(f"{seed} {subject.name} {number}")
        data = subject.mutate(before, generator)
        subject.path.write_bytes(data)
        start_s = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            outcome, why = outcome_of(subject, data, original)
        except Hang:  # on its way out
            outcome, why = "hang", ""
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.perf_counter() - start_s
        tally.slowest_s = max(tally.slowest_s, seconds)
        outcome = "hang" if seconds > HANG_S else outcome
        tally.outcomes[outcome] += 1
        if outcome in BAD and len(tally.failures) < 100:
            tally.failures.append({"case": number, "outcome": outcome, "why": why})
    subject.path.write_bytes(before)
    return tally


def limit_memory() -> None:
    """A forged shape gets an error, not the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def stop(_number: int, _frame: FrameType | None) -> None:
    """The alarm's handler."""
    raise Hang


def main() -> None:
    """Every subject's share of the cases; exit status 1 when one came out badly."""
    parser = parser_of("fuzz", __doc__ or "")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cases = 1000
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # a stranger's file makes no noise either
    signal.signal(signal.SIGALRM, stop)
    began, tallies = environment(), {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        chosen = subjects(Path(folder).resolve())
        limit_memory()
        for subject in chosen:
            if arguments.only in subject.name:
                tallies[subject.name] = tally_of(subject, arguments.cases * subject.share // 100, seed=arguments.seed)
    summary = [_row(name, tally) for name, tally in tallies.items()]
    total = Tally(sum((t.outcomes for t in tallies.values()), Counter()), max(t.slowest_s for t in tallies.values()))
    summary.append(_row("all", total))
    failures = {name: tally.failures for name, tally in tallies.items() if tally.failures}
    leave_result(arguments, began=began, summary=summary, failures=failures)
    sys.exit(1 if any(total.outcomes[name] for name in BAD) else 0)


def _row(name: str, tally: Tally) -> dict[str, Any]:
    counts = {outcome: tally.outcomes[outcome] for outcome in OUTCOMES}
    return {"file": name, "cases": tally.outcomes.total(), **counts, "slowest ms": 1e3 * tally.slowest_s}


if __name__ == "__main__":
    main()
