"""Bytes that a run holds from its first step to its last: the model, what is learned, and the files."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from agzo_edge.budget.facts import input_groups
from agzo_edge.budget.job import FLOAT32_BYTES, Component, Job, folded_rank
from agzo_edge.config import KEPT_CHECKPOINTS, N_MOMENTS
from agzo_edge.units import MIB

MOVABLE = ("weights", "embeddings")  # what offload moves
CPU_COLUMNS = 16  # of the 16-bit copy, a multiple of it on a CPU: numerics/products.py fills it up
WORD_BYTES = 400  # of a tokenizer's vocabulary, merges included: 334 at 150,000 words, 418 at 32,000 (tokenizers 0.23)
HUB_LIBRARY_BYTES = 75 * MIB  # datasets, pandas and pyarrow with it (datasets 5.2, 2026-11)
INDEX_LINE_BYTES = 12  # of a data file's line: where it begins, and its size
ORDER_LINE_BYTES = 2 * 4 + 2 * 8  # two epochs' orders, and one in the making: random words and their ranks
_RULES = {
    "4bit": "1/2 B + 4 B for each block of 64",
    "4bit-nested": "1/2 B + 1 B for each block of 64 + 4 B for each 256 blocks",
    "8bit": "1 B + 4 B for each output",
    "dense": "",
}
JOURNAL_LINE_BYTES = 300  # a step's line without its gradients
JOURNAL_EXAMPLE_BYTES = 24  # a projected gradient and its weight, as text


def held_components(job: Job) -> Iterator[Component]:
    """What the run holds, where it is held: most of it on the device that computes."""
    yield from frozen_layers(job)
    yield from embeddings(job)
    yield workspace(job)
    yield accumulated_adapter(job)
    yield window(job)
    yield best_state(job)
    if job.data.indexed_lines:
        yield line_index(job)
    yield from libraries(job)
    if job.data.n_bytes:
        yield Component("data", job.data.n_bytes, job.host, "tokens and labels of all rows, in their objects")


def libraries(job: Job) -> Iterator[Component]:
    """What the libraries take: measured once for each kind of machine, and what model and data add to it."""
    yield Component("context", job.profile.context_overhead, "device", "libraries, before the first tensor")
    words = job.facts.vocab_size
    yield Component("tokenizer", words * WORD_BYTES, job.host, f"a vocabulary of {words:,} x {WORD_BYTES} B")
    if job.data_is_of_hub:
        yield Component("hub's library", HUB_LIBRARY_BYTES, job.host, "datasets, imported for data of the hub alone")


def frozen_layers(job: Job) -> Iterator[Component]:
    """The linear layers as they are held, and those that target = dequantized opens beside their stored form.

    With offload = layers the stored form waits outside the device, and on a GPU the packed bytes of two blocks
    are on the card: one in use, one on its way. Opened layers stay on the device. So does the form
    they were opened from, unless the file's own tensor serves unconverted: it then stays mapped.
    """
    opened, facts = job.opened, job.facts
    sizes = {name: job.layer_bytes(shape) for name, shape in facts.linears.items()}
    n_weights = sum(out * inp for out, inp in facts.linears.values())
    formula = f"{n_weights:,} weights in {len(facts.linears)} layers x {_RULES[job.stored_as]}"
    if job.stored_as == "dense":
        formula += f"{job.value_bytes} B"
    movable_bytes = sum(n_bytes for name, n_bytes in sizes.items() if name not in opened)
    yield Component("weights", movable_bytes, job.place_of("layers"), formula)
    if opened:
        n_opened = sum(out * inp for out, inp in opened.values())
        held_bytes = job.value_bytes if job.dtype == "bfloat16" else FLOAT32_BYTES
        origin_bytes = sum(sizes[name] for name in opened)
        in_file = job.on_cpu and job.stored_as == "dense" and not job.converts(f"{next(iter(opened))}.weight")
        yield Component("opened layers", n_opened * held_bytes, "device", f"{n_opened:,} weights x {held_bytes} B")
        yield Component("their stored form", origin_bytes, "mapped" if in_file else "device", "what was opened")
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
    others = "norms, biases, experts as they are" if facts.has_experts else "norms, biases"
    yield Component("norms", facts.other_entries * b, "device", f"{facts.other_entries:,} {others} x {b} B")
    if place == "host":
        part_bytes = min(job.config.logits_chunk, facts.vocab_size * facts.hidden_size * b)
        yield Component("head part", part_bytes, "device", "a part of the vocabulary's head at a time")


def workspace(job: Job) -> Component:
    """The one buffer that quantized weights are dequantized into, as large as the largest of them."""
    if job.stored_as == "dense":
        return Component("dequantization", 0, "device", "weights are used as they are held")
    largest = max(out * inp for out, inp in job.facts.linears.values())
    formula = f"{largest:,} weights of the largest layer x {job.value_bytes} B"
    return Component("dequantization", largest * job.value_bytes, "device", formula)


def accumulated_adapter(job: Job) -> Component:
    """Each layer's folded windows in float32, and their copy in the compute dtype for the forward.

    The copy has the present window beside it. In the step that opens a window the sum before it is kept as
    well, to go back to on an error. Bytes: (out + in) (folded 4 + (folded + rank) b + (folded − rank) 4),
    in the copy `folded` filled up to a multiple of CPU_COLUMNS where that is needed.
    With target = dequantized windows are written into the weights, and only the present one is beside them.
    """
    rank, b = job.config.rank, job.value_bytes
    width = sum(out + inp for out, inp in job.targets.values())
    folded = 0 if job.opened else folded_rank(job)
    before = max(0, folded - rank)
    filled = -folded % CPU_COLUMNS if job.multiplies_in_blocks else 0
    copied = folded + filled + rank
    n_bytes = width * ((folded + before) * FLOAT32_BYTES + copied * b)
    formula = f"(out + in) of {len(job.targets)} layers = {width:,} x ({folded + before} x 4 B + {copied} x {b} B)"
    return Component("adapter", n_bytes, "device", formula)


def window(job: Job) -> Component:
    """The window in float32: each input's basis and guide and the last ones; what an update has of the size of C.

    That is C and the direction that it follows, which for momentum is the new moment, beside the old one; for Adam
    two old and two new moments.
    """
    fixed = 2 * (basis_entries(job) + guide_entries(job))
    n_alike = {"momentum": 3, "adam": 6}.get(job.config.optimizer, 2)
    coefficients = n_alike * coefficient_entries(job, job.targets)
    formula = (
        f"rank {job.config.rank} x 4 B x (2 bases of each input, 2 guides of {len(job.guided)} layers, "
        f"{n_alike} tensors like C of {len(job.targets)})"
    )
    return Component("window", (fixed + coefficients) * FLOAT32_BYTES, "device", formula)


def best_state(job: Job) -> Component:
    """The learner's best state, to go back to: folded windows, and the window that was open; in the host's memory."""
    config = job.config
    if not config.can_go_back:
        return Component("best state", 0, "host", "the run does not go back")
    width = sum(out + inp for out, inp in job.targets.values())
    of_window = (1 + N_MOMENTS[config.optimizer]) * coefficient_entries(job, job.targets) + guide_entries(job)
    n_bytes = (width * folded_rank(job) + basis_entries(job) + of_window) * FLOAT32_BYTES
    formula = f"(out + in) {width:,} x {folded_rank(job)} x 4 B, and a window of rank {config.rank}"
    return Component("best state", n_bytes, job.host, formula)


def line_index(job: Job) -> Component:
    """Where the lines of a large data file are, and the order in which they are taken: in the host's memory."""
    line_bytes = INDEX_LINE_BYTES + ORDER_LINE_BYTES
    formula = f"{job.data.indexed_lines:,} lines x {line_bytes} B, index and order"
    return Component("data index", job.data.indexed_lines * line_bytes, job.host, formula)


def basis_entries(job: Job) -> int:
    """Numbers in one window's bases: layers with the same input share one."""
    return sum(width * min(job.config.rank, width) for width in input_groups(job.targets).values())


def guide_entries(job: Job) -> int:
    """Numbers in one window's guides: D (out, rank) of each layer that is led."""
    return coefficient_entries(job, job.guided)


def coefficient_entries(job: Job, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Numbers in the coefficients of these layers, (out, rank) each."""
    return sum(out * min(job.config.rank, inp) for out, inp in shapes.values())


def disk_components(job: Job) -> Iterator[Component]:
    """What the run directory will hold at its end, the last few checkpoints in it, and the cache folder meanwhile.

    A checkpoint is the adapter and the learner's state, whose folded windows may be twice as wide.
    """
    config = job.config
    width = sum(out + inp for out, inp in job.targets.values())
    adapter_bytes = width * config.adapter_rank * FLOAT32_BYTES
    n_checkpoints = min(KEPT_CHECKPOINTS, config.max_steps // config.save_steps) if config.save_steps else 1
    line_bytes = JOURNAL_LINE_BYTES + JOURNAL_EXAMPLE_BYTES * config.batch_size
    window_entries = basis_entries(job) + guide_entries(job)
    adapter_rule = f"(out + in) {width:,} x rank {config.adapter_rank} x 4 B"
    yield Component("adapter", adapter_bytes, "disk", adapter_rule)
    checkpoint_bytes = 3 * adapter_bytes + window(job).n_bytes + best_state(job).n_bytes
    rule = f"{n_checkpoints} x (adapter + folded windows of twice its rank + window + best state)"
    yield Component("checkpoints", n_checkpoints * checkpoint_bytes, "disk", rule)
    yield Component("journal", config.max_steps * line_bytes, "disk", f"{config.max_steps} x {line_bytes} B")
    mapped_bytes = sum(part.n_bytes for part in held_components(job) if part.name in MOVABLE and part.where == "mapped")
    yield Component("mapped weights", mapped_bytes, "cache", "what waits outside memory, in a file")
    bases_bytes = job.n_windows * window_entries * FLOAT32_BYTES
    yield Component("bases", bases_bytes, "disk", f"{job.n_windows} windows x {window_entries:,} x 4 B, guides too")
