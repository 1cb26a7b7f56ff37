"""Machine profiles: what a plan must know about the hardware, from a TOML file.

The shipped ones lie in `profiles/` of the checkout and in `agzo_edge/profiles` of an installed wheel.
"""

import difflib
import tomllib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agzo_edge.config import Bytes, RunConfig, config_from
from agzo_edge.errors import ConfigError, numbered
from agzo_edge.paths import expanded
from agzo_edge.units import format_bytes


class Profile(BaseModel):
    """A machine: its memory, its speed, and the settings that suit it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    description: str = ""
    kind: Literal["cuda", "cpu"]
    device_names: tuple[str, ...] = ()  # as NVML spells them, or a part of a board's name: `auto` goes by them
    unified_memory: bool = False  # the GPU computes in the host's memory, as on a Jetson: one budget for both
    memory: Bytes  # of the device that computes: the GPU's, or the host's when there is none
    reserve: Bytes  # left to the desktop and to other programs
    context_overhead: Bytes  # what the libraries take before the first tensor, outside torch's allocator
    host_memory: Bytes | None = None  # what a run on a GPU may take of the host's; None is not checked
    memory_bandwidth_gb_s: float | None = Field(default=None, gt=0)  # shown, and not planned with, as the next one
    pcie_gb_s: float | None = Field(default=None, gt=0)
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    bf16: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)  # suggested values of RunConfig's fields

    @property
    def budget_bytes(self) -> int:
        """What a run may use on the device, the libraries' overhead included."""
        return self.memory - self.reserve

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        faults = []
        if self.reserve + self.context_overhead >= self.memory:
            faults.append(
                f"reserve {format_bytes(self.reserve)} and context_overhead "
                f"{format_bytes(self.context_overhead)} leave nothing of memory {format_bytes(self.memory)}"
            )
        if self.kind == "cuda" and self.compute_capability is None:
            faults.append("a cuda profile needs compute_capability, such as '8.6'")
        if self.unified_memory and (self.kind == "cpu" or self.host_memory is not None):
            faults.append("unified_memory is for a GPU that has no memory but the host's: leave host_memory out")
        faults += [
            f"settings.{name}: no such setting{_did_you_mean(name, RunConfig.model_fields)}"
            for name in self.settings
            if name not in RunConfig.model_fields
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self


def load_profile(name_or_path: str) -> Profile:
    """The shipped profile of that name, or the profile in that TOML file.

    Raises ConfigError for an unknown name, with the close ones, and for a file with a wrong field.
    """
    return _read(profile_file(name_or_path), name_or_path)


def profile_file(name_or_path: str) -> Traversable:
    """The file of that profile. Raises ConfigError for an unknown name, with the close ones."""
    if name_or_path.endswith(".toml") or "/" in name_or_path or "\\" in name_or_path:
        return Path(expanded(name_or_path))
    if name_or_path not in profile_names():
        raise ConfigError(
            f"profile {name_or_path!r} does not exist{_did_you_mean(name_or_path, profile_names())}. "
            f"There are auto, {', '.join(profile_names())}; or give the path of a .toml file"
        )
    return profile_folder() / f"{name_or_path}.toml"


def profile_names() -> tuple[str, ...]:
    """The names of the shipped profiles, in order."""
    entries = (entry.name for entry in profile_folder().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in entries if name.endswith(".toml")))


def profile_folder() -> Traversable:
    """Where the shipped profiles lie: in the installed package, else beside it in the checkout."""
    packaged = resources.files("agzo_edge") / "profiles"
    if packaged.is_dir():
        return packaged
    checkout = Path(__file__).resolve().parents[2] / "profiles"
    if checkout.is_dir():
        return checkout
    raise ConfigError(f"no profiles in {packaged} nor in {checkout}: is agzo-edge installed whole?")


def _read(file: Traversable, origin: str) -> Profile:
    try:
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"profile {origin}: no such file") from None
    except (OSError, RuntimeError, ValueError) as error:  # no TOML, nested too deeply, a name that is none
        raise ConfigError(f"profile {origin}: cannot be read as TOML: {error}") from None
    try:
        profile = Profile(**fields)
    except ValidationError as error:
        raise ConfigError(f"profile {origin} cannot be used:\n" + numbered(_faults(error))) from None
    try:
        config_from(profile.settings)
    except ConfigError as error:
        raise ConfigError(f"profile {origin}, [settings]: {error}") from None
    return profile


def _faults(error: ValidationError) -> list[str]:
    """One line per wrong field: its name, what was given, and what is allowed."""
    lines = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"]) or "profile"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"no such field{_did_you_mean(field, Profile.model_fields)}"
        elif fault["type"] == "missing":
            message = "is missing"
        elif fault["type"] != "value_error":
            message = f"{fault['input']!r} given; {message[0].lower()}{message[1:]}"
        lines.append(f"{field}: {message}")
    return lines


def _did_you_mean(word: str, known: Any) -> str:
    """The question "did you mean X?" for the closest of `known`; nothing when none is close."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
