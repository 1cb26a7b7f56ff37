"""What a plan is computed from, and the constants of the byte arithmetic."""

from dataclasses import dataclass
from typing import Literal

from agzo_edge.budget.facts import ModelFacts, StoredAs
from agzo_edge.budget.profile import Profile
from agzo_edge.config import RunConfig

Where = Literal["device", "host", "mapped", "disk"]  # mapped: pages of a file, which the kernel may drop

STREAMS = 2  # both signs, or the value and its tangent, go through the model as one batch
FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Component:
    """One line of a plan."""

    name: str
    n_bytes: int
    where: Where
    formula: str  # with the numbers put in, for a person


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on a machine, by the sizes that take memory."""

    facts: ModelFacts
    config: RunConfig
    profile: Profile
    targets: dict[str, tuple[int, int]]  # layers that carry a branch: (out_features, in_features)
    on_cpu: bool
    dtype: str  # of the computation
    rows_per_example: int
    row_tokens: int  # of the longest row
    indexed_lines: int = 0  # of a data file that is too large to be held

    @property
    def value_bytes(self) -> int:
        """Bytes of one number in the compute dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def extra_float32_bytes(self) -> int:
        """Bytes of the float32 copy that a 16-bit number needs beside it where a formula is in float32."""
        return FLOAT32_BYTES if self.value_bytes < FLOAT32_BYTES else 0

    @property
    def micro_examples(self) -> int:
        """Examples that one forward takes."""
        return min(self.config.micro_batch_size or self.config.batch_size, self.config.batch_size)

    @property
    def directions(self) -> int:
        """Noise matrices of a layer in one step."""
        return 1 if self.config.directions == "shared" else self.config.batch_size

    @property
    def streams(self) -> int:
        """Copies of each row in one forward: both signs when they are fused, or the value and its tangent."""
        return STREAMS if self.config.fuse_signs or self.config.difference == "exact" else 1

    @property
    def rows(self) -> int:
        """Rows of one forward, all streams."""
        return self.streams * self.micro_examples * self.rows_per_example

    @property
    def tokens(self) -> int:
        """Tokens of one forward when every row is the longest."""
        return self.rows * self.row_tokens

    @property
    def mlp_tokens(self) -> int:
        """Tokens of one forward that an MLP works on at once; an MLP that is no module of its own takes all (OPT)."""
        chunk = self.config.mlp_chunk_tokens
        if chunk is None or not self.facts.has_mlp_module:
            return self.tokens
        return self.rows * min(chunk, self.row_tokens)

    def place_of(self, part: Literal["embeddings", "layers"]) -> Where:
        """Where `part` is held: on a CPU what waits is in a mapped file, beside a GPU in the host's memory."""
        if self.config.offload not in (part, "layers"):
            return "device"
        return "mapped" if self.on_cpu else "host"

    @property
    def stored_as(self) -> StoredAs:
        """How the frozen layers are held: as the checkpoint has them, else as the run asks."""
        if self.facts.stored_as != "dense":
            return self.facts.stored_as
        if self.config.load_in_8bit:
            return "8bit"
        if self.config.load_in_4bit:
            return "4bit-nested" if self.config.double_quant else "4bit"
        return "dense"

    @property
    def n_windows(self) -> int:
        """Windows that the run opens."""
        every = self.config.refresh_every
        return 1 if every == 0 else -(-self.config.max_steps // every)
