"""What a plan is computed from, and the constants of the byte arithmetic."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agzo_edge.budget.facts import ModelFacts, StoredAs
from agzo_edge.budget.profile import Profile
from agzo_edge.config import RunConfig
from agzo_edge.writers import writes_to_residual

Where = Literal["device", "host", "mapped", "cache", "disk"]  # mapped: pages of files, which the kernel may drop

STREAMS = 2  # both signs, or the value and its tangent, go through the model as one batch
FLOAT32_BYTES = 4
BLOCK_4BIT = 64  # weights that share a scale: bitsandbytes' default
BLOCK_NESTED = 256  # scales that share a scale of their own
CODE_BOOKS_BYTES = 16 * 4 + 256 * 4  # of one nested 4-bit layer: the weights' code, and the scales'
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of safetensors' dtypes


@dataclass(frozen=True)
class Component:
    """One line of a plan."""

    name: str
    n_bytes: int
    where: Where
    formula: str  # with the numbers put in, for a person


@dataclass(frozen=True, kw_only=True)
class DataShape:
    """What a plan must know about the data; by default nothing is known."""

    rows_per_example: int = 1  # 1 for lm, 2 for preference; the most options of an example for choice
    longest_tokens: int | None = None  # None: as many as max_seq_length allows
    label_tokens: int | None = None  # of the row with most; None: all but the first
    n_bytes: int = 0  # of the tokenized data in memory
    indexed_lines: int = 0  # of a data file that is too large to be held


UNKNOWN_DATA = DataShape()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on a machine, by the sizes that take memory."""

    facts: ModelFacts
    config: RunConfig
    profile: Profile
    targets: dict[str, tuple[int, int]]  # layers that carry a branch: (out_features, in_features)
    on_cpu: bool
    dtype: str  # of the computation
    data: DataShape

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row: of the data where it is known, within what is allowed and the model can."""
        allowed = min(self.config.max_seq_length, self.facts.positions or self.config.max_seq_length)
        return min(self.data.longest_tokens or allowed, allowed)

    @property
    def label_tokens(self) -> int:
        """Tokens of a row that are predicted, at most."""
        possible = self.row_tokens - 1
        return possible if self.data.label_tokens is None else min(self.data.label_tokens, possible)

    @property
    def value_bytes(self) -> int:
        """Bytes of one number in the compute dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def extra_float32_bytes(self) -> int:
        """Bytes of the float32 copy that a 16-bit number needs beside it where a formula is in float32."""
        return FLOAT32_BYTES if self.value_bytes < FLOAT32_BYTES else 0

    @property
    def multiplies_in_blocks(self) -> bool:
        """Whether products go in blocks of one size, as in 16 bit on a CPU: numerics/products.py."""
        return self.on_cpu and self.value_bytes < FLOAT32_BYTES

    @property
    def micro_examples(self) -> int:
        """Examples that one forward takes."""
        return min(self.config.micro_batch_size or self.config.batch_size, self.config.batch_size)

    @property
    def directions(self) -> int:
        """Noise matrices of a layer in one step."""
        return 1 if self.config.directions == "shared" else self.config.batch_size

    @property
    def pass_directions(self) -> int:
        """Noise matrices of a layer in one forward."""
        return 1 if self.config.directions == "shared" else self.micro_examples

    @property
    def exact(self) -> bool:
        """Whether each value carries its tangent, instead of a perturbed copy."""
        return self.config.difference == "exact"

    @property
    def streams(self) -> int:
        """Copies of each row in one forward: both signs when they are fused, or the value and its tangent."""
        return STREAMS if self.config.fuse_signs or self.exact else 1

    @property
    def rows(self) -> int:
        """Rows of one forward, all streams."""
        return self.streams * self.micro_examples * self.data.rows_per_example

    @property
    def tokens(self) -> int:
        """Tokens of one forward when every row is the longest."""
        return self.rows * self.row_tokens

    @property
    def mlp_share(self) -> float:
        """The part of a row's tokens that an MLP works on at once; one that is no module takes all (OPT)."""
        chunk = self.config.mlp_chunk_tokens
        if chunk is None or not self.facts.has_mlp_module:
            return 1.0
        return min(1.0, chunk / self.row_tokens)

    @property
    def finds_bases_in_pass(self) -> bool:
        """Whether a window's bases come out of the step's own pass, and not of plain ones before it."""
        return self.is_one_pass and self.config.guide == "none"

    @property
    def is_one_pass(self) -> bool:
        """Whether every layer meets all inputs of a step in one call."""
        whole = self.micro_examples == self.config.batch_size and self.config.mlp_chunk_tokens is None
        return whole and self.streams == STREAMS and self.config.objective != "reward"  # which writes token by token

    @property
    def guided(self) -> dict[str, tuple[int, int]]:
        """The layers whose noise follows a guide."""
        return {} if self.config.guide == "none" else {n: s for n, s in self.targets.items() if writes_to_residual(n)}

    @property
    def freely_perturbed(self) -> dict[str, tuple[int, int]]:
        """The layers that have full noise."""
        return {name: shape for name, shape in self.targets.items() if name not in self.guided}

    @property
    def trains_only_writers(self) -> bool:
        """Whether every layer that carries a branch writes to the residual stream."""
        return all(map(writes_to_residual, self.targets))

    @property
    def host(self) -> Where:
        """Where the host's memory counts: on a CPU it is the device's."""
        return "device" if self.on_cpu else "host"

    @property
    def data_is_of_hub(self) -> bool:
        """Whether the rows come from a data set of the hub, and not from a file or a directory."""
        return self.config.data is not None and not Path(self.config.data).exists()

    def place_of(self, part: Literal["embeddings", "layers"]) -> Where:
        """Where `part` is held: on a CPU what waits is in a mapped file, beside a GPU in the host's memory."""
        if self.config.offload not in (part, "layers"):
            return "device"
        return "mapped" if self.on_cpu else "host"

    def converts(self, tensor: str) -> bool:
        """Whether a tensor is in another dtype in its file than it is computed with."""
        return _TORCH_NAMES.get(self.facts.tensors[tensor].dtype) != self.dtype

    @property
    def opened(self) -> dict[str, tuple[int, int]]:
        """The layers that are held dequantized, to be written to."""
        return self.targets if self.config.target == "dequantized" else {}

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

    def layer_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of one frozen layer's weight of `shape` (out, in) as it is held."""
        return layer_bytes(shape, self.stored_as, value_bytes=self.value_bytes)

    @property
    def n_windows(self) -> int:
        """Windows that the run opens."""
        every = self.config.refresh_every
        return 1 if every == 0 else -(-self.config.max_steps // every)


def layer_bytes(shape: tuple[int, int], stored_as: StoredAs, *, value_bytes: int) -> int:
    """Bytes of one frozen layer's weight of `shape` (out, in).

    4bit: n/2 + 4 for each block of 64 weights. 4bit-nested: n/2 + 1 for each block, 4 for each 256 blocks,
    and the code books. 8bit: n + 4 out. dense: n times the compute dtype's bytes.
    """
    n_weights = shape[0] * shape[1]
    n_blocks = -(-n_weights // BLOCK_4BIT)
    packed_bytes = -(-n_weights // 2)
    if stored_as == "4bit":
        return packed_bytes + FLOAT32_BYTES * n_blocks
    if stored_as == "4bit-nested":
        return packed_bytes + n_blocks + FLOAT32_BYTES * -(-n_blocks // BLOCK_NESTED) + CODE_BOOKS_BYTES
    if stored_as == "8bit":
        return n_weights + FLOAT32_BYTES * shape[0]
    return n_weights * value_bytes


def folded_rank(job: Job) -> int:
    """The largest rank of a layer's folded windows: `rank` more each window, compressed over twice `adapter_rank`."""
    if job.config.adapter is not None:
        return 2 * job.config.adapter_rank
    return min(2 * job.config.adapter_rank, (job.n_windows - 1) * job.config.rank)
