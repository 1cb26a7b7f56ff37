"""Bytes that come and go: what the fullest moment of a run takes beside what the run holds all the time.

A run passes through moments, and its peak is the fullest one, not their sum: what one moment frees, the next
may use (docs/decisions/0010 says how the CPU's allocator is made to keep to that). The moments of a pass are
in activations.py; here are the others, and the lines that the fullest one becomes in the plan's table.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from agzo_edge.budget.activations import Moment, block_moments
from agzo_edge.budget.held import CPU_COLUMNS, basis_entries, coefficient_entries, guide_entries, workspace
from agzo_edge.budget.job import FLOAT32_BYTES, Component, Job, folded_rank
from agzo_edge.budget.noise import drawn_noise
from agzo_edge.units import MIB

CUDA_SLACK_SHARE = 0.05  # estimate: what torch's CUDA allocator rounds up or cannot reuse
CPU_SLACK_BYTES = 8 * MIB  # measured: tensors below the threshold of malloc, which stay in the heap; Python's own
CPU_SLACK_SHARE = 0.01  # measured: pages, and the heap's gaps
CPU_TRIMMED_BYTES = 1 * MIB  # measured: in place of both where the heap has just been trimmed
CPU_KERNEL_BYTES = round(0.27 * MIB)  # measured: what oneDNN has of the code for a shape of 16-bit products, for good
CPU_KEPT_KERNELS = 32  # each of which takes as much again: model/memory.py
CPU_16BIT_BYTES = 8 * MIB  # measured: the heap's gaps between them, which differ by 5 MiB from run to run
CPU_16BIT_TRIMMED_BYTES = 9 * MIB // 2  # where it has just been trimmed
CPU_ATTENTION_BYTES = 15 * MIB // 2  # measured, 3 to 8: of attention that is written out, with shapes of its own
CPU_ROWS = 128  # of a block of 16-bit products, of which a chunk of logits has whole ones: numerics/products.py
LOADER_COPIES = 2  # of a tensor on its way to a GPU: as it was read, and as it is computed with
NEXT_TOKEN_BYTES = 4 * FLOAT32_BYTES + 2 * 8  # for each word, while a token is drawn
LOGITS_COPIES = 2  # float32 copies of a chunk of logits, in log-sum-exp
EXACT_COPIES = 4  # with its tangent
GUIDE_COPIES = 2  # with the way back; half of one in 16 bit beside them
GUIDE_PIECES = 2  # of a chunk, where a gradient is asked for: numerics/loss.py
WRITING_BYTES = 12  # for each weight: the change, the sum, the random bits of its rounding
WRITING_BFLOAT16_BYTES = 20  # and the two integers that the rounding goes through
EXTRACTING_BYTES = 12  # for each weight: as held and as it was in float32, the change
QUANTIZING_8BIT_BYTES = 2 + 2  # for each weight: in float16, and its absolute value


def working_components(job: Job) -> Iterator[Component]:
    """The fullest moment of the run on the device, by its parts, and what the allocator adds."""
    fullest = max(moments(job), key=lambda moment: moment.n_bytes + _slack(job, moment)[0])
    yield from _components(job, fullest)
    slack_bytes, rule = _slack(job, fullest)
    yield Component("allocator", slack_bytes, "device", rule)


def _slack(job: Job, moment: Moment) -> tuple[int, str]:
    """What the allocator adds to a moment, and the rule for it."""
    if not job.on_cpu:
        return math.ceil(CUDA_SLACK_SHARE * moment.n_bytes), f"{CUDA_SLACK_SHARE:.0%} of the moment above (estimate)"
    share, fixed_bytes = (0.0, CPU_TRIMMED_BYTES) if moment.trimmed else (CPU_SLACK_SHARE, CPU_SLACK_BYTES)
    if job.multiplies_in_blocks and not moment.loads:
        fixed_bytes += _kernel_bytes(job) + (CPU_16BIT_TRIMMED_BYTES if moment.trimmed else CPU_16BIT_BYTES)
        written_out = job.exact or (job.facts.block.caps_scores and not moment.trimmed)
        fixed_bytes += CPU_ATTENTION_BYTES if written_out else 0
    rule = f"{share:.0%} of the moment above + {fixed_bytes / MIB:.0f} MiB"
    return fixed_bytes + math.ceil(share * moment.n_bytes), rule


def _kernel_bytes(job: Job) -> int:
    """What a CPU's 16-bit products leave: the code for each shape of weight, all blocks of tokens being alike.

    There are the layers', the head's on both ways, and of a branch its window's factors and its folded ones, whose
    width grows by whole columns.
    """
    folded_widths = 0 if job.opened else -(-folded_rank(job) // CPU_COLUMNS)
    of_branches = len({inp for _, inp in job.targets.values()}) + len({out for out, _ in job.targets.values()})
    of_head = 1 if job.config.guide == "none" else 2
    n_shapes = len(set(job.facts.linears.values())) + of_head + of_branches * (1 + folded_widths)
    return CPU_KERNEL_BYTES * (n_shapes + min(n_shapes, CPU_KEPT_KERNELS))


def moments(job: Job) -> Iterator[Moment]:
    """Every moment at which a run may be at its fullest."""
    yield from block_moments(job)
    yield logits(job)
    yield updating(job)
    yield saving(job)
    if job.config.written_tokens:
        yield from answering(job)
    if job.config.guide != "none":
        yield from guiding(job)
    if job.opened:
        yield writing(job)
        yield merging(job)
    if job.on_cpu:
        yield from loading(job)


def logits(job: Job) -> Moment:
    """The states that predict a label, and one chunk of their logits.

    A chunk holds at most `logits_chunk` bytes of float32; log-sum-exp has it twice, exact differences four times. A
    model that caps its logits has one copy more in float32, three with the tangent; one that divides them, one with it.
    """
    streams = 1 if job.exact else job.streams
    words, at_once = _chunk(job, streams=streams)
    caps = job.facts.caps_logits and job.value_bytes == FLOAT32_BYTES
    copies = EXACT_COPIES + 3 * caps + job.facts.divides_logits if job.exact else LOGITS_COPIES + caps
    gathered = job.rows * job.label_tokens * job.facts.hidden_size * job.value_bytes
    chunk = FLOAT32_BYTES * streams * at_once * words * copies
    return Moment(name="logits", activations=gathered, logits=chunk, trimmed=True)


def _chunk(job: Job, *, streams: int) -> tuple[int, int]:
    """The words and the label positions of a chunk of logits; of a head on the host only a part is there at once."""
    facts, chunk_bytes = job.facts, job.config.logits_chunk
    positions = job.rows // job.streams * job.label_tokens
    words = facts.vocab_size
    if job.place_of("embeddings") == "host":
        words = min(words, max(1, chunk_bytes // (facts.hidden_size * job.value_bytes)))
    at_once = max(1, chunk_bytes // (FLOAT32_BYTES * words * streams))
    if job.multiplies_in_blocks and at_once * streams > CPU_ROWS:
        at_once -= at_once % (CPU_ROWS // streams)
    return words, min(positions, at_once)


def answering(job: Job) -> Iterator[Moment]:
    """Texts on their way: keys and values of all tokens, beside a block at the prompts, then the next token's logits.

    A cache grows by a copy: while a layer's is made longer, the old one is there as well. Prompts are padded in front,
    and so have masks, as bytes and as the kernel takes them. A row's logits and their probabilities, while a token is
    drawn, take four float32 and two float64 for each word.
    """
    facts = job.facts
    token_bytes = 2 * facts.n_layers * facts.kv_width * job.value_bytes
    tokens = job.rows * (job.row_tokens + job.config.written_tokens)
    cache = tokens * (token_bytes + token_bytes // facts.n_layers)
    fullest = max(block_moments(job), key=lambda moment: moment.n_bytes)
    masks = job.rows * job.row_tokens**2 * (1 + job.value_bytes)
    yield replace(fullest, name=f"{fullest.name}, answering", cache=cache, mask=max(fullest.mask, masks))
    yield Moment(name="next token", logits=job.rows * facts.vocab_size * NEXT_TOKEN_BYTES, cache=cache)


def guiding(job: Job) -> Iterator[Moment]:
    """The plain pass that finds the guides, and the errors at its end.

    Each guided layer keeps one micro-batch's coordinates. If signs go one after the other they stand beside a block; at
    the end, beside the gradient of the last hidden states. Then it keeps its guess (out, rank). The logits' way back
    goes in pieces of a chunk: the logits and their gradient in float32, and what caps and quotients keep or copy
    (measured).
    """
    facts = job.facts
    tokens = job.tokens // job.streams
    kept = FLOAT32_BYTES * guide_entries(job) + len(job.guided) * tokens * job.config.rank * job.value_bytes
    if job.streams == 1:
        fullest = max(block_moments(job), key=lambda moment: moment.n_bytes)
        yield replace(fullest, name=f"{fullest.name}, guiding", activations=fullest.activations + kept)
    states = tokens * facts.hidden_size * (3 * job.value_bytes + FLOAT32_BYTES)
    words, at_once = _chunk(job, streams=1)
    if job.value_bytes == FLOAT32_BYTES:
        copies: float = GUIDE_COPIES + 3 * facts.caps_logits + facts.divides_logits
    else:
        copies = GUIDE_COPIES + 0.5 + facts.caps_logits
    piece = -(-at_once // GUIDE_PIECES) * words * FLOAT32_BYTES * copies
    yield Moment(name="guide", activations=kept + states, logits=piece, trimmed=True)


def updating(job: Job) -> Moment:
    """The update: the whole batch's full noise of the widest layer that has it, drawn again in float32."""
    widest = max((out for out, _ in job.freely_perturbed.values()), default=0)
    noise = drawn_noise(job, widest, directions=job.directions, value_bytes=FLOAT32_BYTES)
    return Moment(name="update", noise=noise)


def saving(job: Job) -> Moment:
    """A checkpoint on its way to the disk: four copies of the adapter, or three of the learner's state and its best."""
    width = sum(out + inp for out, inp in job.targets.values())
    adapter = width * job.config.adapter_rank * FLOAT32_BYTES
    of_window = basis_entries(job) + guide_entries(job) + coefficient_entries(job, job.targets)
    state = (width * folded_rank(job) + of_window) * FLOAT32_BYTES
    state *= 2 if job.config.can_go_back else 1
    largest = max(out * inp for out, inp in job.targets.values())
    extracting = largest * EXTRACTING_BYTES if job.opened else 0
    return Moment(name="saving", activations=max(4 * adapter, 3 * state) + extracting)


def writing(job: Job) -> Moment:
    """A window's change on its way into the largest of the layers that are held dequantized."""
    per_weight = WRITING_BFLOAT16_BYTES if job.dtype == "bfloat16" else WRITING_BYTES
    return Moment(name="opening a window", activations=max(o * i for o, i in job.opened.values()) * per_weight)


def loading(job: Job) -> Iterator[Moment]:
    """The largest layer while it is converted and quantized, then embeddings on their way into a mapped file.

    Layers come before the embeddings, whose memory is still free then, as the workspace's is until a step. Between the
    two the heap is trimmed.
    """
    facts, b = job.facts, job.value_bytes
    layer, (out, inp) = max(facts.linears.items(), key=lambda item: item[1][0] * item[1][1])
    per_weight = b if job.converts(f"{layer}.weight") else 0
    if job.stored_as == "8bit":
        per_weight += QUANTIZING_8BIT_BYTES
    unused = 0 if job.opened else workspace(job).n_bytes
    if job.place_of("embeddings") == "mapped":
        moved = facts.tensors[facts.largest_other].n_entries * b if job.converts(facts.largest_other) else 0
        yield Moment(name="moving the embeddings", activations=max(0, moved - unused), trimmed=True, loads=True)
    else:
        unused += (facts.embedding_entries + facts.head_entries) * b
    yield Moment(name="loading", activations=max(0, out * inp * per_weight - unused), loads=True)


def merging(job: Job) -> Moment:
    """The merged checkpoint on its way to the disk, layer by layer: those that learned something through float32.

    Such a weight is summed up from what is held and what the last window learned.
    """
    b = job.value_bytes
    converted = FLOAT32_BYTES + b if b < FLOAT32_BYTES else 0
    widest = max(out * inp for out, inp in job.opened.values())
    return Moment(name="merging", activations=widest * (converted + 2 * FLOAT32_BYTES))


def host_components(job: Job) -> Iterator[Component]:
    """What comes and goes in the host's memory beside a GPU; on a CPU all of it is in the device's budget."""
    if job.on_cpu:
        return
    tensors = job.facts.tensors
    largest = LOADER_COPIES * max(tensor.n_entries for tensor in tensors.values()) * job.value_bytes
    experts = sum(tensor.n_bytes for name, tensor in tensors.items() if ".experts." in name)
    rule = f"{LOADER_COPIES} copies of the largest tensor" + (", and all experts, fused" if experts else "")
    yield Component("loader", largest + experts, "host", rule)
    widest = job.directions * max((out for out, _ in job.freely_perturbed.values()), default=0) * job.config.rank
    n_bytes = 2 * -(-widest // 8) if job.config.noise == "sign" else widest * FLOAT32_BYTES * 11
    yield Component("noise", n_bytes, "host", f"random words of {widest:,} entries of the widest layer")


def _components(job: Job, moment: Moment) -> Iterator[Component]:
    """The parts of a moment as lines of the plan."""
    pair = f"{job.rows} rows x {job.row_tokens:,} tokens"
    formulas = {
        "activations": f"{pair} x {moment.activations / job.tokens:,.0f} B ({moment.name})",
        "mask": f"{pair} x {moment.mask / job.tokens:,.0f} B",
        "noise": "one layer's noise",
        "logits": f"a chunk of {job.facts.vocab_size:,} logits for each position",
    }
    if moment.cache:
        written = job.config.written_tokens
        formulas["cache"] = f"{job.rows} rows x ({job.row_tokens:,} + {written:,} written) tokens x all layers"
    names = {"mask": "attention mask", "logits": "logits chunk", "cache": "KV cache"}
    for field, formula in formulas.items():
        yield Component(names.get(field, field), math.ceil(getattr(moment, field)), "device", formula)
