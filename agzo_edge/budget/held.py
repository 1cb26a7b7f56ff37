"""Bytes that a run holds from its first step to its last: the model, what is learned, and the files."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from agzo_edge.budget.facts import StoredAs, input_groups
from agzo_edge.budget.job import FLOAT32_BYTES, Component, Job
from agzo_edge.config import KEPT_CHECKPOINTS

BLOCK_4BIT = 64  # weights that share a scale: bitsandbytes' default
BLOCK_NESTED = 256  # scales that share a scale of their own
CODE_BOOKS_BYTES = 16 * 4 + 256 * 4  # of one nested 4-bit layer: the weights' code, and the scales'
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2, "sign": 0}  # of the optimizer, each the size of C
INDEX_LINE_BYTES = 12  # of a data file's line: where it begins, and its size
ORDER_LINE_BYTES = 2 * 4 + 2 * 8  # two epochs' orders, and one in the making: random words and their ranks
JOURNAL_LINE_BYTES = 300  # a step's line without its gradients
JOURNAL_EXAMPLE_BYTES = 24  # a projected gradient and its weight, as text


def held_components(job: Job) -> Iterator[Component]:
    """What a run holds from its first step to its last: on the device, unless it waits outside."""
    yield from frozen_layers(job)
    yield from embeddings(job)
    yield accumulated_adapter(job)
    yield window(job)
    if job.indexed_lines:
        yield line_index(job)
    yield Component("context", job.profile.context_overhead, "device", "libraries, before the first tensor")


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


def frozen_layers(job: Job) -> Iterator[Component]:
    """The linear layers as they are held, and those that target = dequantized opens beside their stored form.

    With offload = layers the stored form waits outside the device, and on a GPU the packed bytes of two blocks
    are on the card: one in use, one on its way. Opened layers are written to and stay.
    """
    opened = job.targets if job.config.target == "dequantized" else {}
    sizes = {
        name: layer_bytes(shape, job.stored_as, value_bytes=job.value_bytes)
        for name, shape in job.facts.linears.items()
    }
    movable_bytes = sum(n_bytes for name, n_bytes in sizes.items() if name not in opened)
    n_weights = sum(out * inp for out, inp in job.facts.linears.values())
    rule = {
        "4bit": "1/2 B + 4 B for each block of 64",
        "4bit-nested": "1/2 B + 1 B for each block of 64 + 4 B for each 256 blocks",
        "8bit": "1 B + 4 B for each output",
        "dense": f"{job.value_bytes} B",
    }[job.stored_as]
    formula = f"{n_weights:,} weights in {len(job.facts.linears)} layers x {rule}"
    yield Component("weights", movable_bytes, job.place_of("layers"), formula)
    if opened:
        n_opened = sum(out * inp for out, inp in opened.values())
        held_bytes = job.value_bytes if job.dtype == "bfloat16" else FLOAT32_BYTES
        opened_bytes = sum(sizes[name] for name in opened) + n_opened * held_bytes
        rule = f"{n_opened:,} weights of {len(opened)} layers x {held_bytes} B, and their stored form"
        yield Component("opened layers", opened_bytes, "device", rule)
    if job.place_of("layers") == "host":
        yield Component("streamed", 2 * largest_block_bytes(sizes), "device", "two blocks: one in use, one on its way")


def largest_block_bytes(sizes: Mapping[str, int]) -> int:
    """The stored bytes of the largest block of layers, those whose names share the block's number."""
    blocks: Counter[str] = Counter()
    for name, n_bytes in sizes.items():
        blocks[re.sub(r"(\.\d+)\..*", r"\1", name)] += n_bytes
    return max(blocks.values())


def embeddings(job: Job) -> Iterator[Component]:
    """Embeddings and head, a tied one counted once, and what always stays on the device: norms, biases.

    A head that waits on the host comes in parts of the vocabulary of about the bytes of a logits chunk.
    """
    facts, b = job.facts, job.value_bytes
    n_entries = facts.embedding_entries + facts.head_entries
    head = "tied head" if facts.tied else "head"
    place = job.place_of("embeddings")
    yield Component("embeddings", n_entries * b, place, f"{n_entries:,} numbers (embeddings, {head}) x {b} B")
    yield Component("norms", facts.other_entries * b, "device", f"{facts.other_entries:,} norms, biases x {b} B")
    if place == "host":
        part_bytes = min(job.config.logits_chunk, facts.vocab_size * facts.hidden_size * b)
        yield Component("head part", part_bytes, "device", "a part of the vocabulary's head at a time")


def accumulated_adapter(job: Job) -> Component:
    """Each layer's folded windows in float32, and their copy in the compute dtype for the forward.

    The sum grows by `rank` a window and is compressed when it passes twice `adapter_rank`; the forward's
    copy has the present window beside it. Bytes: (out + in) (folded 4 + (folded + rank) b).
    """
    config = job.config
    folded = min(2 * config.adapter_rank, (job.n_windows - 1) * config.rank)
    if config.adapter is not None:
        folded = 2 * config.adapter_rank
    width = sum(out + inp for out, inp in job.targets.values())
    n_bytes = width * (folded * FLOAT32_BYTES + (folded + config.rank) * job.value_bytes)
    formula = (
        f"(out + in) of {len(job.targets)} layers = {width:,} x ({folded} x 4 B + {folded + config.rank} x "
        f"{job.value_bytes} B)"
    )
    return Component("adapter", n_bytes, "device", formula)


def window(job: Job) -> Component:
    """The window in float32: each input's basis and the last one, coefficients, gradients and moments."""
    rank = job.config.rank
    bases = 2 * basis_entries(job)
    n_moments = MOMENTS[job.config.optimizer]
    coefficients = (2 + n_moments) * sum(out * min(rank, inp) for out, inp in job.targets.values())
    formula = (
        f"rank {rank} x 4 B x (2 bases of each input, coefficients, gradient and {n_moments} moments of each layer)"
    )
    return Component("window", (bases + coefficients) * FLOAT32_BYTES, "device", formula)


def line_index(job: Job) -> Component:
    """Where the lines of a large data file are, and the order in which they are taken: in the host's memory."""
    line_bytes = INDEX_LINE_BYTES + ORDER_LINE_BYTES
    formula = f"{job.indexed_lines:,} lines x {line_bytes} B, index and order"
    return Component("data index", job.indexed_lines * line_bytes, "device" if job.on_cpu else "host", formula)


def basis_entries(job: Job) -> int:
    """Numbers in one window's bases: layers with the same input share one."""
    return sum(width * min(job.config.rank, width) for width in input_groups(job.targets).values())


def disk_components(job: Job) -> Iterator[Component]:
    """What the run directory will hold at its end; of the checkpoints only the last few are kept.

    A checkpoint is the adapter and the learner's state, whose folded windows may be twice as wide.
    """
    config = job.config
    width = sum(out + inp for out, inp in job.targets.values())
    adapter_bytes = width * config.adapter_rank * FLOAT32_BYTES
    n_checkpoints = min(KEPT_CHECKPOINTS, config.max_steps // config.save_steps) if config.save_steps else 1
    line_bytes = JOURNAL_LINE_BYTES + JOURNAL_EXAMPLE_BYTES * config.batch_size
    bases_bytes = job.n_windows * basis_entries(job) * FLOAT32_BYTES
    adapter_rule = f"(out + in) {width:,} x rank {config.adapter_rank} x 4 B"
    yield Component("adapter", adapter_bytes, "disk", adapter_rule)
    checkpoint_bytes = 3 * adapter_bytes + window(job).n_bytes
    rule = f"{n_checkpoints} x (adapter + folded windows of twice its rank + window)"
    yield Component("checkpoints", n_checkpoints * checkpoint_bytes, "disk", rule)
    yield Component("journal", config.max_steps * line_bytes, "disk", f"{config.max_steps} x {line_bytes} B")
    mapped_bytes = sum(part.n_bytes for part in held_components(job) if part.where == "mapped")
    yield Component("mapped weights", mapped_bytes, "disk", "what waits outside memory, in the cache folder")
    yield Component("bases", bases_bytes, "disk", f"{job.n_windows} windows x {basis_entries(job):,} x 4 B")
