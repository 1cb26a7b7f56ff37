"""The predicted memory of a run: every component against the limit of its place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from agzo_edge.budget.block import MEASURED
from agzo_edge.budget.detect import DiskRoom, disk_room
from agzo_edge.budget.facts import ModelFacts
from agzo_edge.budget.held import disk_components, held_components
from agzo_edge.budget.job import UNKNOWN_DATA, Component, DataShape, Job, Where
from agzo_edge.budget.profile import Profile
from agzo_edge.budget.qlora import QloraNeed
from agzo_edge.budget.working import host_components, working_components
from agzo_edge.config import RunConfig
from agzo_edge.errors import ConfigError
from agzo_edge.units import format_bytes

EXPERTS_LAYERS = {"gate_proj", "up_proj", "down_proj", "gate"}  # as PEFT 0.21 knows them by their names


class Saving(NamedTuple):
    """A change of the settings that saves memory."""

    flags: str
    saved_bytes: int
    fits: bool  # whether this change alone makes the plan fit


class InPieces(NamedTuple):
    """How the ladder would take a run that does not fit as it was asked for."""

    how: str
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run will need, component by component, against its limits."""

    profile_name: str
    dtype: str  # of the computation
    rows: int  # of one forward, all streams
    row_tokens: int  # of the longest row
    components: tuple[Component, ...]
    limit_bytes: int  # of the device that computes
    host_limit_bytes: int | None  # None: not checked, or the host is the device
    disk_limit_bytes: int | None = None  # for the run where it will be written; None: not known where
    cache_limit_bytes: int | None = None  # for what waits in the cache folder; None: nothing does
    largest_layer_bytes: int = 0  # as it is held: less than that no ladder reaches
    notes: tuple[str, ...] = ()  # what a person should know who asked for this
    changes: tuple[Saving, ...] = ()
    in_pieces: InPieces | None = None  # when it does not fit, and a rung of the ladder does
    qlora: QloraNeed | None = None  # for comparison

    def __str__(self) -> str:
        """The peak, what is allowed, and whether it fits."""
        need, limit = format_bytes(self.device_bytes), format_bytes(self.limit_bytes)
        return f"{need} at the peak, {limit} allowed on {self.profile_name}: {'fits' if self.fits else 'does not fit'}"

    def bytes_on(self, where: Where) -> int:
        """The sum of the components in one place."""
        return sum(component.n_bytes for component in self.components if component.where == where)

    def bytes_of(self, *names: str) -> int:
        """The sum of the device's components of these names."""
        return sum(part.n_bytes for part in self.components if part.where == "device" and part.name in names)

    @property
    def device_bytes(self) -> int:
        """The predicted peak on the device that computes: the GPU, or the host of a CPU run."""
        return self.bytes_on("device")

    @property
    def least_bytes(self) -> int:
        """What the device must hold however the run is taken: the libraries and the largest layer's weights."""
        return self.bytes_of("context") + self.largest_layer_bytes

    @property
    def headroom_bytes(self) -> int:
        """What the device's limit leaves; negative when the plan does not fit."""
        return self.limit_bytes - self.device_bytes

    @property
    def limits(self) -> Iterator[tuple[Where, int, int]]:
        """Each place that has a limit, what is needed there, and the limit."""
        yield "device", self.device_bytes, self.limit_bytes
        if self.host_limit_bytes is not None:
            yield "host", self.bytes_on("host"), self.host_limit_bytes
        if self.disk_limit_bytes is not None:
            yield "disk", self.bytes_on("disk"), self.disk_limit_bytes
        if self.cache_limit_bytes is not None:
            yield "cache", self.bytes_on("cache"), self.cache_limit_bytes

    @property
    def tightest(self) -> Where:
        """The first place whose limit does not hold; the device where all do."""
        return next((where for where, need_bytes, limit_bytes in self.limits if need_bytes > limit_bytes), "device")

    def excess_bytes(self, where: Where) -> int:
        """What is needed in a place that has a limit, beyond it; negative where it fits."""
        return next(need_bytes - limit_bytes for place, need_bytes, limit_bytes in self.limits if place == where)

    @property
    def fits(self) -> bool:
        """Whether every limit holds."""
        return all(need_bytes <= limit_bytes for _, need_bytes, limit_bytes in self.limits)

    @property
    def can_run(self) -> bool:
        """Whether training with these settings would begin: as asked for, or in pieces."""
        return self.fits or self.in_pieces is not None

    def to_dict(self) -> dict[str, Any]:
        """The plan for JSON; every amount in bytes."""
        return {
            "profile": self.profile_name,
            "dtype": self.dtype,
            "rows": self.rows,
            "row_tokens": self.row_tokens,
            "fits": self.fits,
            "device_bytes": self.device_bytes,
            "limit_bytes": self.limit_bytes,
            "headroom_bytes": self.headroom_bytes,
            "host_bytes": self.bytes_on("host"),
            "host_limit_bytes": self.host_limit_bytes,
            "disk_bytes": self.bytes_on("disk"),
            "disk_limit_bytes": self.disk_limit_bytes,
            "cache_bytes": self.bytes_on("cache"),
            "cache_limit_bytes": self.cache_limit_bytes,
            "components": [
                {"name": part.name, "where": part.where, "bytes": part.n_bytes, "formula": part.formula}
                for part in self.components
            ],
            "changes": [change._asdict() for change in self.changes],
            "in_pieces": None if self.in_pieces is None else self.in_pieces._asdict(),
            "qlora": None if self.qlora is None else self.qlora.to_dict(),
            "notes": list(self.notes),
        }


def predicted_memory(
    facts: ModelFacts,
    config: RunConfig,
    profile: Profile,
    *,
    data: DataShape = UNKNOWN_DATA,
    room: DiskRoom | None = None,
) -> MemoryPlan:
    """The plan of the run that `config` describes on `profile`'s machine, without advice.

    `room` is that of its disks now; without it they are asked, which takes longer than all else.
    Raises ModelError when target_modules matches no layer, ConfigError for a limit or a device that the
    machine does not have.
    """
    job = job_of(facts, config, profile, data=data)
    parts = (*held_components(job), *working_components(job), *host_components(job), *disk_components(job))
    device_bytes = sum(part.n_bytes for part in parts if part.where == "device")
    room = room or disk_room(config.output_dir)
    return MemoryPlan(
        profile_name=profile.name,
        dtype=job.dtype,
        rows=job.rows,
        row_tokens=job.row_tokens,
        components=parts,
        limit_bytes=device_limit(config, profile),
        host_limit_bytes=None if job.on_cpu else host_limit(config, profile, device_bytes=device_bytes),
        disk_limit_bytes=room.run_bytes,
        cache_limit_bytes=_cache_limit(parts, room),
        largest_layer_bytes=max(job.layer_bytes(shape) for shape in facts.linears.values()),
        notes=tuple(_notes(job)),
    )


def _cache_limit(parts: Sequence[Component], room: DiskRoom) -> int | None:
    """What may wait in the cache folder, where anything does: what is free, less the run's own part of that disk."""
    if not any(part.n_bytes for part in parts if part.where == "cache"):
        return None
    of_run = sum(part.n_bytes for part in parts if part.where == "disk") if room.is_one_disk else 0
    return max(0, room.cache_bytes - of_run)


def job_of(facts: ModelFacts, config: RunConfig, profile: Profile, *, data: DataShape = UNKNOWN_DATA) -> Job:
    """The run by the sizes that take memory. Raises ModelError and ConfigError as `predicted_memory`."""
    return Job(
        facts=facts,
        config=config,
        profile=profile,
        targets=facts.targets(config.target_modules),
        on_cpu=computes_on_cpu(config, profile),
        dtype=compute_dtype(config, profile),
        data=data,
    )


def _notes(job: Job) -> Iterator[str]:
    """What of the settings and of the checkpoint does not take effect, or not as one would think, and why."""
    facts, config = job.facts, job.config
    if facts.layers_stored > facts.n_layers:
        yield f"config.json says {facts.n_layers} layers: of the weights' {facts.layers_stored} the others are left out"
    if facts.positions is not None and config.max_seq_length > facts.positions:
        yield f"rows have {facts.positions:,} tokens at most: the model has no more positions"
    trained = facts.targets(config.target_modules) if facts.has_experts else ()
    if named := {name.rpartition(".")[2] for name in trained} & EXPERTS_LAYERS:
        names = ", ".join(sorted(named))
        yield f"PEFT takes {names} for the experts' where a model has some, and not for these: use `export --to merged`"
    if facts.rotary_change is not None and config.max_seq_length > facts.rotary_change:
        yield (
            f"a row over {facts.rotary_change:,} tokens changes how the model turns the positions of its whole batch: "
            "losses depend on which rows come together, and so on the size of the pieces"
        )
    if facts.has_state_space:
        yield "what its state-space mixers keep while they scan is not counted: the peak may be higher (measured: 29 %)"
    elif facts.model_type not in MEASURED:
        yield (
            f"activations of models of type {facts.model_type!r} were not measured, and the plan may be too low (of "
            "others by up to half of the peak)"
        )
    if facts.stored_as == "dense":
        return
    bits = "8 bit" if facts.stored_as == "8bit" else "4 bit"
    without_effect = {
        "--load-in-8bit": config.load_in_8bit and facts.stored_as != "8bit",
        "--no-load-in-4bit": not config.load_in_4bit and not config.load_in_8bit,
        "--double-quant": config.double_quant and facts.stored_as != "4bit-nested",
    }
    for flag in (flag for flag, given in without_effect.items() if given):
        yield f"{flag} has no effect: the checkpoint is saved in {bits}, and is used as it is"


def computes_on_cpu(config: RunConfig, profile: Profile) -> bool:
    """Whether the run computes on the host. Raises ConfigError for CUDA on a machine without a GPU."""
    if config.device == "cuda" and profile.kind == "cpu":
        raise ConfigError(
            f"device is 'cuda', and profile '{profile.name}' has no GPU: use --device cpu, or a GPU's profile"
        )
    return config.device == "cpu" or (config.device == "auto" and profile.kind == "cpu")


def compute_dtype(config: RunConfig, profile: Profile) -> str:
    """The dtype of the computation; auto is float32 on a CPU, and on a GPU bfloat16 where it has it."""
    if config.dtype != "auto":
        return config.dtype
    if computes_on_cpu(config, profile):
        return "float32"
    return "bfloat16" if profile.bf16 else "float16"


def device_limit(config: RunConfig, profile: Profile) -> int:
    """The limit of the memory that is computed in: the flag that names it, else the profile's budget.

    A CPU run keeps to the smaller of both flags: whoever asks for 6GiB wants no more, wherever it is.
    Raises ConfigError for a limit above the memory that there is.
    """
    on_cpu = computes_on_cpu(config, profile)
    flags = {"--ram-limit": config.ram_limit, "--vram-limit": config.vram_limit}
    given = {flag: n_bytes for flag, n_bytes in flags.items() if n_bytes and (on_cpu or flag == "--vram-limit")}
    if given:
        flag, n_bytes = min(given.items(), key=lambda item: item[1])
        if profile.kind == ("cpu" if on_cpu else "cuda") and n_bytes > profile.memory:
            raise ConfigError(
                f"{flag} {format_bytes(n_bytes)} is more than the {format_bytes(profile.memory)} that profile "
                f"'{profile.name}' has: leave the flag out to use what is free"
            )
        return n_bytes
    if on_cpu and profile.host_memory is not None:
        return profile.host_memory
    return profile.budget_bytes


def host_limit(config: RunConfig, profile: Profile, *, device_bytes: int) -> int | None:
    """The limit of the host's memory beside a GPU; of a memory that both share, what the device leaves."""
    limits = [config.ram_limit or profile.host_memory]
    if profile.unified_memory:
        limits.append(max(0, device_limit(config, profile) - device_bytes))
    return min((limit for limit in limits if limit is not None), default=None)
