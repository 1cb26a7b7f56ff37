"""The predicted memory of a run: every component against the limit of its place."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agzo_edge.budget.facts import ModelFacts
from agzo_edge.budget.held import disk_components, held_components
from agzo_edge.budget.job import Component, Job, Where
from agzo_edge.budget.profile import Profile
from agzo_edge.budget.qlora import QloraNeed
from agzo_edge.budget.working import host_components, working_components
from agzo_edge.config import RunConfig


class Change(NamedTuple):
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
    rows: int  # of one forward, both streams
    row_tokens: int  # of the longest row
    components: tuple[Component, ...]
    limit_bytes: int  # of the device that computes
    host_limit_bytes: int | None  # None: not checked, or the host is the device
    changes: tuple[Change, ...] = field(default=())
    in_pieces: InPieces | None = None  # when it does not fit, and a rung of the ladder does
    qlora: QloraNeed | None = None  # for comparison

    def bytes_on(self, where: Where) -> int:
        """The sum of the components in one place."""
        return sum(component.n_bytes for component in self.components if component.where == where)

    @property
    def device_bytes(self) -> int:
        """The predicted peak on the device that computes: the GPU, or the host of a CPU run."""
        return self.bytes_on("device")

    @property
    def headroom_bytes(self) -> int:
        """What the device's limit leaves; negative when the plan does not fit."""
        return self.limit_bytes - self.device_bytes

    @property
    def fits(self) -> bool:
        """Whether the device's and the host's limits hold."""
        host_fits = self.host_limit_bytes is None or self.bytes_on("host") <= self.host_limit_bytes
        return self.headroom_bytes >= 0 and host_fits

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
            "components": [
                {"name": part.name, "where": part.where, "bytes": part.n_bytes, "formula": part.formula}
                for part in self.components
            ],
            "changes": [change._asdict() for change in self.changes],
            "in_pieces": None if self.in_pieces is None else self.in_pieces._asdict(),
            "qlora": None if self.qlora is None else self.qlora.to_dict(),
        }


def predicted_memory(
    facts: ModelFacts,
    config: RunConfig,
    profile: Profile,
    *,
    rows_per_example: int = 1,  # 1 for lm; the most options of an example for choice
    longest_tokens: int | None = None,  # of the data, where it is known; max_seq_length otherwise
    indexed_lines: int = 0,  # of a data file that is too large to be held
) -> MemoryPlan:
    """The plan of the run that `config` describes on `profile`'s machine, without advice.

    Raises ModelError when target_modules matches no layer.
    """
    job = job_of(
        facts,
        config,
        profile,
        rows_per_example=rows_per_example,
        longest_tokens=longest_tokens,
        indexed_lines=indexed_lines,
    )
    parts = (*held_components(job), *working_components(job), *host_components(job), *disk_components(job))
    device_bytes = sum(part.n_bytes for part in parts if part.where == "device")
    return MemoryPlan(
        profile_name=profile.name,
        dtype=job.dtype,
        rows=job.rows,
        row_tokens=job.row_tokens,
        components=parts,
        limit_bytes=device_limit(config, profile),
        host_limit_bytes=None if job.on_cpu else host_limit(config, profile, device_bytes=device_bytes),
    )


def job_of(
    facts: ModelFacts,
    config: RunConfig,
    profile: Profile,
    *,
    rows_per_example: int = 1,
    longest_tokens: int | None = None,
    indexed_lines: int = 0,
) -> Job:
    """The run by the sizes that take memory. Raises ModelError when target_modules matches no layer."""
    return Job(
        facts=facts,
        config=config,
        profile=profile,
        targets=facts.targets(config.target_modules, guide=config.guide),
        on_cpu=computes_on_cpu(config, profile),
        dtype=compute_dtype(config, profile),
        rows_per_example=rows_per_example,
        row_tokens=min(longest_tokens or config.max_seq_length, config.max_seq_length),
        indexed_lines=indexed_lines,
    )


def computes_on_cpu(config: RunConfig, profile: Profile) -> bool:
    """Whether the run computes on the host."""
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
    """
    on_cpu = computes_on_cpu(config, profile)
    flags = (config.ram_limit, config.vram_limit) if on_cpu else (config.vram_limit,)
    given = [flag for flag in flags if flag is not None]
    if given:
        return min(given)
    if on_cpu and profile.host_memory is not None:
        return profile.host_memory
    return profile.budget_bytes


def host_limit(config: RunConfig, profile: Profile, *, device_bytes: int) -> int | None:
    """The limit of the host's memory beside a GPU; of a memory that both share, what the device leaves."""
    limits = [config.ram_limit or profile.host_memory]
    if profile.unified_memory:
        limits.append(max(0, device_limit(config, profile) - device_bytes))
    return min((limit for limit in limits if limit is not None), default=None)
