"""Bytes that come and go within a step: activations, logits, noise, workspaces, and the loader before them.

The counts of live tensors were measured with torch's profiler on the CPU: the peak of all tensor bytes in
one forward, in units of tokens x width (torch 2.13, transformers 5.23, random models of hidden 512 and
2 layers, 4 rows of 512 tokens, 2026-11). Width letters: h hidden, q all heads, kv key heads, m MLP.
"""

import math
from collections.abc import Iterator

from agzo_edge.budget.job import FLOAT32_BYTES, Component, Job, Where
from agzo_edge.writers import writes_to_residual

LOADER_COPIES = 2  # a tensor as stored and in the compute dtype, while it is quantized
CUDA_SLACK_SHARE = 0.05  # estimate: what torch's CUDA allocator rounds up or cannot reuse
SIGN_ENTRY_BYTES = 4 + 2  # a float32, and two bytes while the bits are spread
GAUSSIAN_ENTRY_BYTES = 4 + 40  # a float32, and float64 words, uniforms, radius, angle and values
# Float32 copies of a chunk of logits that its way back adds. Measured: 3.0 chunks of 512 x 8,000, in float32 and
# bfloat16 (torch's profiler, 2026-11).
GUIDE_LOGITS = 3

# Tensors of width h and of width m that are alive at the MLP's peak. Measured: Llama, Qwen3, Gemma 3
# 4 h + 3 m; Phi-3 4 h + 4 m; GPT-2, whose GELU is written out, 5.25 h + 4 m; GPT-NeoX, OPT 4 h + 2 m.
MLP_LIVE = {"gated": (4, 3), "fused gate": (4, 4), "written out": (6, 4), "plain": (4, 2)}


def working_components(job: Job) -> Iterator[Component]:
    """What a step takes on the device beyond what it holds, and what the loader takes beyond that."""
    logits = logits_chunk(job)
    parts = [activations(job), attention_mask(job), logits, workspace(job), noise(job)]
    if job.config.written_tokens:
        parts += [kv_cache(job), written_logits(job)]
    if job.config.guide != "none":
        parts.append(guide(job))
    yield from parts
    working_bytes = sum(part.n_bytes for part in parts)
    yield allocator_slack(job, working_bytes=working_bytes, logits_bytes=logits.n_bytes)
    if job.on_cpu:
        yield loader(job, "device", spare_bytes=working_bytes)


def host_components(job: Job) -> Iterator[Component]:
    """What a run on a GPU takes of the host's memory; on a CPU all of it is in the device's budget."""
    if not job.on_cpu:
        yield loader(job, "host")
        yield host_noise(job)


def activations(job: Job) -> Component:
    """The working memory of a block: its attention's or its MLP's, whichever is larger."""
    phases = {"attention": attention_bytes(job), "MLP": mlp_bytes(job)}
    name, n_bytes = max(phases.items(), key=lambda phase: phase[1])
    formula = f"{job.rows} rows x {job.row_tokens} tokens x {n_bytes / job.tokens:,.0f} B ({name})"
    return Component("activations", n_bytes, "device", formula)


def attention_bytes(job: Job) -> int:
    """Bytes at the attention's peak: tokens (2 h + 5 q + 3.25 kv) b, and the scores where they are kept.

    Measured, q = h: Llama 10.06 h with kv = h and 7.56 h with kv = h/4, Qwen3 8.06 h with kv = h/2.
    A soft cap (Gemma 2) has no fused kernel: two float32 copies of the scores, and one in 16 bit.
    Exact differences have none either, and compute in float32: 5.1 copies for each row and its tangent.
    """
    facts, b = job.facts, job.value_bytes
    h, q, kv = facts.hidden_size, facts.n_heads * facts.head_dim, facts.n_kv_heads * facts.head_dim
    quarters = job.tokens * (8 * h + 20 * q + 13 * kv)
    scores = job.rows * facts.n_heads * job.row_tokens**2
    if job.config.difference == "exact":
        return (quarters * FLOAT32_BYTES + scores * FLOAT32_BYTES * 21 // 2) // 4
    if facts.keeps_scores:
        return quarters * b // 4 + scores * (FLOAT32_BYTES + b + job.extra_float32_bytes)
    return quarters * b // 4


def mlp_bytes(job: Job) -> int:
    """Bytes at the MLP's peak, in an ordinary pass or in one that finds bases, whichever is larger.

    Ordinary: tokens (n_h h + n_m m) b, see MLP_LIVE; exact differences join both streams before a matmul.
    Finding bases: the streams' mean and its valid tokens in float32, together m for each token, and first
    a float32 copy of a 16-bit stream. Beside float32 that is no more than the ordinary peak. In pieces, only
    `mlp_tokens` of the tokens are m wide at once, and the pieces' outputs stand beside them, at the end twice.
    """
    h, m = job.facts.hidden_size, job.facts.mlp_width
    n_h, n_m = MLP_LIVE[job.facts.mlp_style]
    joined = 2 if job.config.difference == "exact" else 0
    ordinary = (n_m + joined) * m * job.value_bytes
    finding = (n_m - 1) * m * job.value_bytes + (FLOAT32_BYTES + job.extra_float32_bytes) * m
    pieces = job.tokens - job.mlp_tokens  # their outputs, which are joined at the end
    return (n_h * job.tokens + 2 * pieces) * h * job.value_bytes + job.mlp_tokens * max(ordinary, finding)


def attention_mask(job: Job) -> Component:
    """The mask of padding and causality: a byte for each pair of tokens; a GPU's kernel copies it."""
    pair_bytes = 1 if job.on_cpu else 1 + job.value_bytes
    formula = f"{job.rows} rows x {job.row_tokens}² tokens x {pair_bytes} B"
    return Component("attention mask", job.rows * job.row_tokens**2 * pair_bytes, "device", formula)


def logits_chunk(job: Job) -> Component:
    """The logits of as many label positions as fit the chunk: float32, twice (log-sum-exp), and in 16 bit.

    Exact differences count only the value, not its tangent, against the chunk, and hold each twice.
    Measured (Llama, vocabulary 32,000, 2 x 512 tokens, exact): 4.1 chunks of 64 MiB, planned 4.
    """
    vocab = job.facts.vocab_size
    streams, carried = (1, 2) if job.config.difference == "exact" else (job.streams, 1)
    positions = max(1, job.config.logits_chunk // (FLOAT32_BYTES * vocab * streams))
    positions = min(positions, job.tokens // job.streams)
    entry_bytes = carried * (FLOAT32_BYTES + job.value_bytes + job.extra_float32_bytes)
    formula = f"{streams * positions:,} rows of logits x {vocab:,} tokens x {entry_bytes} B"
    return Component("logits chunk", streams * positions * vocab * entry_bytes, "device", formula)


def kv_cache(job: Job) -> Component:
    """The keys and values of every token of the prompts and of the texts written after them."""
    facts, tokens = job.facts, job.row_tokens + job.config.written_tokens
    token_bytes = 2 * facts.n_layers * facts.n_kv_heads * facts.head_dim * job.value_bytes
    formula = f"{job.rows} rows x {tokens:,} tokens x {token_bytes:,} B"
    # A cache grows by a copy: while a layer's is made longer, the old one is there as well.
    n_bytes = job.rows * tokens * (token_bytes + token_bytes // facts.n_layers)
    return Component("KV cache", n_bytes, "device", formula)


def written_logits(job: Job) -> Component:
    """The logits of each row's next token, and their probabilities while one is drawn: in all 4 float32, 2 float64."""
    entry_bytes = 4 * FLOAT32_BYTES + 2 * 8
    n_bytes = job.rows * job.facts.vocab_size * entry_bytes
    return Component("next token", n_bytes, "device", f"{job.rows} rows x {job.facts.vocab_size:,} tokens x 32 B")


def guide(job: Job) -> Component:
    """What the pass that finds the guides takes beyond a plain one: a chunk of logits on its way back, and guesses.

    The way back holds GUIDE_LOGITS float32 copies of a chunk of one stream's logits. Each guided layer keeps its U,
    every example's guess (out, rank), and the coordinates of one micro-batch.
    """
    config, vocab = job.config, job.facts.vocab_size
    positions = min(max(1, config.logits_chunk // (FLOAT32_BYTES * vocab)), job.tokens // job.streams)
    shapes = [shape for name, shape in job.targets.items() if writes_to_residual(name)]
    columns = config.guide_rank + config.batch_size * config.rank
    kept = sum(out for out, _ in shapes) * columns + len(shapes) * job.tokens // job.streams * config.rank
    n_bytes = FLOAT32_BYTES * (GUIDE_LOGITS * positions * vocab + kept)
    formula = f"{GUIDE_LOGITS} x {positions:,} rows of logits x {vocab:,} tokens, {len(shapes)} guided layers; x 4 B"
    return Component("guide", n_bytes, "device", formula)


def workspace(job: Job) -> Component:
    """The largest layer dequantized for its matmul, in the compute dtype."""
    if job.stored_as == "dense":
        return Component("dequantization", 0, "device", "weights are used as they are held")
    largest = max(out * inp for out, inp in job.facts.linears.values())
    formula = f"{largest:,} weights of the largest layer x {job.value_bytes} B"
    return Component("dequantization", largest * job.value_bytes, "device", formula)


def noise(job: Job) -> Component:
    """The noise of the widest layer; it is drawn for one layer at a time, used and dropped."""
    entry_bytes = SIGN_ENTRY_BYTES
    if job.config.noise == "gaussian":  # made on the CPU in float64, then moved
        entry_bytes = GAUSSIAN_ENTRY_BYTES if job.on_cpu else FLOAT32_BYTES
    widest = _widest_noise(job)
    formula = f"{job.directions} directions x {widest:,} entries of the widest layer x {entry_bytes} B"
    return Component("noise", job.directions * widest * entry_bytes, "device", formula)


def host_noise(job: Job) -> Component:
    """The random words of the widest layer on their way to the GPU: a bit for a sign, packed twice."""
    entries = job.directions * _widest_noise(job)
    n_bytes = 2 * -(-entries // 8) if job.config.noise == "sign" else entries * GAUSSIAN_ENTRY_BYTES
    return Component("noise", n_bytes, "host", f"random words of {entries:,} entries of the widest layer")


def _widest_noise(job: Job) -> int:
    """Entries of one direction of the layer with most of them: out x rank."""
    return max(out * min(job.config.rank, inp) for out, inp in job.targets.values())


def allocator_slack(job: Job, *, working_bytes: int, logits_bytes: int) -> Component:
    """What an allocator holds beyond the tensors.

    CPU: glibc does not give one phase's heap back while the next runs, so the two largest of attention, MLP
    and logits add up; the MLP or attention and the logits are in the table already. RssAnon beyond the
    loaded model, measured (planned): Llama, hidden 512, MLP 1408, 4-bit, whole steps, 8 x 512 tokens
    216 (231) MiB, 32 x 256: 316 (337); Qwen3 255 (252); GPT-2 188 (310); forward alone, 8 x 1024: 337 (361).
    CUDA: an estimated share.
    """
    if job.on_cpu:
        second_bytes = max(0, min(attention_bytes(job), mlp_bytes(job)) - logits_bytes)
        return Component("allocator", second_bytes, "device", "heap that one phase keeps from the next")
    slack_bytes = math.ceil(CUDA_SLACK_SHARE * working_bytes)
    return Component("allocator", slack_bytes, "device", f"{CUDA_SLACK_SHARE:.0%} of the above (estimate)")


def loader(job: Job, where: Where, *, spare_bytes: int = 0) -> Component:
    """The largest tensor, stored and converted, while loading; a step's working memory is unused then."""
    entries = max(tensor.n_entries for tensor in job.facts.tensors.values())
    needed = LOADER_COPIES * max(job.facts.largest_stored_bytes, entries * job.value_bytes)
    beyond = " beyond the above, which a step uses later" if spare_bytes else ""
    formula = f"{LOADER_COPIES} copies of the largest tensor{beyond}"
    return Component("loader", max(0, needed - spare_bytes), where, formula)
