"""What is alive at the fullest moments of a forward pass: tensors of tokens x width, and what a matmul adds.

Each count was read off torch's allocation events (torch 2.13, transformers 5.23, CPU, 2026-11): the live
tensors at the peak of every submodule of the second block, for Llama, Qwen2, Qwen3, Mistral, Gemma 2 and 3,
Phi-3, GPT-2, GPT-NeoX and OPT. Widths: h hidden, q all query heads, kv all key heads, m MLP.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from agzo_edge.budget.job import FLOAT32_BYTES, Job
from agzo_edge.budget.noise import layer_noise

DELTA_CHUNK = 64  # tokens that the gated delta rule takes at once
CAPPED_QUERIES = 256  # whose scores exist at once, where attention caps them


class Live(NamedTuple):
    """The widths that an MLP has alive, in units of tokens x width."""

    around: float  # h: embeddings, the block's input, the sum after attention, the normed input
    product: float  # m: at the activation or its product with the gate
    first: float  # m: while the last of the first layers writes its output
    last: float  # m: while the last layer writes its output
    outputs: int  # m: width of the output of a first layer


LIVE = {
    "gated": Live(4, 3, 2, 1, 1),
    "fused gate": Live(4, 4, 2, 3, 2),  # the joined output lives until the block's end
    "written out": Live(5, 4, 1, 1, 1),
    "plain": Live(4, 2, 1, 1, 1),
}
# The same with dual tensors: each value with its tangent, counted in both streams' tokens.
EXACT_LIVE = {
    "gated": Live(3.5, 5, 3.5, 2, 1),
    "fused gate": Live(3.5, 6, 3.5, 4, 2),
    "written out": Live(4.5, 5, 2.5, 2, 1),
    "plain": Live(4, 2.5, 2.5, 2, 1),
}


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One point of a step: what is alive then beside what the run holds, in bytes."""

    name: str
    activations: float = 0
    mask: float = 0
    noise: float = 0
    logits: float = 0
    cache: float = 0  # of keys and values, while texts are written
    trimmed: bool = False  # on a CPU the heap is trimmed just before it
    loads: bool = False  # before the first pass

    @property
    def n_bytes(self) -> float:
        """All of it."""
        return self.activations + self.mask + self.noise + self.logits + self.cache


def block_moments(job: Job) -> Iterator[Moment]:
    """The moments of one block at which a pass may be at its fullest."""
    yield exact_attention(job) if job.exact else attention(job)
    yield attention_output(job)
    yield from delta_rule(job)
    yield from mlp(job)
    yield from experts(job)
    if not job.exact:
        yield from finding_bases(job)


def attention(job: Job) -> Moment:
    """Attention at its kernel: (outer h + (heads + expanded) q + key_values kv) b for each token.

    With fewer key heads than query heads, keys and values are repeated; rotating the queries takes the same. Where
    attention is written out there are two copies of the scores, and in 16 bit one more in float32; two in float32 where
    no kernel of a CPU takes its heads. Where it is ours, there are two copies of some queries' scores in float32, and
    on a CPU everything in it is float32.
    """
    facts, b = job.facts, job.value_bytes
    heads, key_values = _projections(job)
    expanded = 2 if facts.block.rotary else 0
    packed = 2 if job.on_cpu and b < FLOAT32_BYTES else 0  # the CPU's 16-bit kernel lays keys and values out anew
    queries = heads + expanded + packed
    scores = 0.0
    if facts.block.caps_scores:
        scores = job.rows * facts.n_heads * _queries_at_once(job) * job.row_tokens * 2 * FLOAT32_BYTES
        if packed:
            scores += job.tokens * 2 * (facts.query_width + facts.kv_width) * FLOAT32_BYTES
    elif facts.block.keeps_scores:
        queries = heads + expanded - 1  # the output comes after the scores
        scores = job.rows * facts.n_heads * job.row_tokens**2 * (FLOAT32_BYTES + b + job.extra_float32_bytes)
    elif facts.block.uneven_heads and job.on_cpu:
        scores = job.rows * facts.n_heads * job.row_tokens**2 * 2 * FLOAT32_BYTES
    per_token = _outer(job) * facts.hidden_size + queries * facts.query_width + key_values * facts.kv_width
    mask = _mask_bytes(job)
    if mask and not scores:  # as the kernel takes it: a number for each pair
        mask += job.rows * job.row_tokens**2 * b
    return Moment(name="attention", activations=job.tokens * per_token * b + scores, mask=mask)


def delta_rule(job: Job) -> Iterator[Moment]:
    """Linear attention in torch's own operations, where the model has any: chunks of 64 tokens, in float32.

    In its scan five tensors are as wide as the keys of all heads and four as the values, three have 64
    decays for each head, and a row has four copies of its state, keys x values of each head. Beside them stand the
    projections, counted as if keys had as many heads as values.
    """
    facts, rule = job.facts, job.facts.block.delta_rule
    if rule is None:
        return
    chunked_tokens = job.rows * -(-job.row_tokens // DELTA_CHUNK) * DELTA_CHUNK
    of_token = 5 * rule.key_dim + 4 * rule.value_dim + 3 * DELTA_CHUNK
    scan = rule.heads * (chunked_tokens * of_token + job.rows * 4 * rule.key_dim * rule.value_dim)
    projections = _outer(job) * facts.hidden_size + 2 * rule.heads * (rule.key_dim + rule.value_dim)
    yield Moment(name="linear attention", activations=scan * FLOAT32_BYTES + job.tokens * projections * job.value_bytes)


def attention_output(job: Job) -> Moment:
    """Attention's last layer: its input and output, and what still stands from before, (outer + 1) h."""
    facts = job.facts
    heads, key_values = _projections(job)
    per_token = (_outer(job) + 1) * facts.hidden_size + heads * facts.query_width + key_values * facts.kv_width
    return _at_layer(
        job,
        "attention's last layer",
        live=job.tokens * per_token * job.value_bytes + _kept_scores(job),
        shape=(facts.hidden_size, facts.query_width),
        writes=True,
    )


def exact_attention(job: Job) -> Moment:
    """Attention with dual tensors, in torch's own matmuls and float32: five copies of the scores.

    Or four of them and more of the projections, where rows are short. Half of the tokens' rows exist: each
    value comes with its tangent.
    """
    facts, b = job.facts, job.value_bytes
    scores = job.rows / 2 * facts.n_heads * _queries_at_once(job) * job.row_tokens * FLOAT32_BYTES
    in_float32 = 7 if job.extra_float32_bytes else 0  # copies of the projections
    key_values = 3 if facts.block.rotary and not facts.block.fused_qkv else 0
    outer = _outer(job) - 0.5
    long, short = (
        (5 * scores, outer * facts.hidden_size + (4 + in_float32) * facts.query_width + key_values * facts.kv_width),
        (4 * scores, outer * facts.hidden_size + (7 + in_float32) * facts.query_width + key_values * facts.kv_width),
    )
    activations = max(held + job.tokens * per_token * b for held, per_token in (long, short))
    mask = _mask_bytes(job)
    as_taken = job.rows / 2 * b if mask else 1 + b  # without a mask of its own, torch makes one for all rows
    return Moment(name="attention", activations=activations, mask=mask + job.row_tokens**2 * as_taken)


def mlp(job: Job) -> Iterator[Moment]:
    """The MLP at its product and at its first and last layers: tokens (around h + wide m) b.

    If the MLP takes part of a row at a time, its wide tensors shrink by that share. The parts' outputs (h) stand
    beside them, and once more when they are joined.
    """
    facts, b = job.facts, job.value_bytes
    h, m = facts.hidden_size, facts.block.mlp_width
    live = (EXACT_LIVE if job.exact else LIVE)[facts.block.mlp_style]
    wide_tokens = job.tokens * job.mlp_share
    held = (live.around * job.tokens + job.tokens - wide_tokens) * h * b + _kept_scores(job)
    last = h * wide_tokens * (2 if job.exact else 1)
    if job.mlp_share < 1:
        yield Moment(name="MLP, joined", activations=held + job.tokens * h * b, mask=_mask_bytes(job))
    yield Moment(name="MLP", activations=held + wide_tokens * live.product * m * b, mask=_mask_bytes(job))
    first_input = h * wide_tokens * (1 if job.exact or facts.block.positions_by_row else 0)
    first = held + (wide_tokens * live.first * m + first_input) * b
    yield _at_layer(job, "MLP's first layers", live=first, shape=(live.outputs * m, h), writes=False)
    at_last = held + (wide_tokens * live.last * m + last) * b
    yield _at_layer(job, "MLP's last layer", live=at_last, shape=(h, m), writes=True)


def experts(job: Job) -> Iterator[Moment]:
    """Routed experts at their product, all at once: tokens x experts of each x (its input h + 4 m), beside a block's.

    The gate and what it is multiplied with are one tensor, as wide as both; the activation and the product are two.
    """
    facts, routed = job.facts, job.facts.block.experts
    if routed is None:
        return
    around = (EXACT_LIVE if job.exact else LIVE)["gated"].around
    per_token = around * facts.hidden_size + routed.per_token * (facts.hidden_size + 4 * routed.width)
    activations = job.tokens * per_token * job.value_bytes + _kept_scores(job)
    yield Moment(name="experts", activations=activations, mask=_mask_bytes(job))


def finding_bases(job: Job) -> Iterator[Moment]:
    """The MLP's layers while they also find a basis and a scale from their inputs and outputs in float32.

    In the step's own pass the mean of both signs and its valid tokens are made, of a 16-bit tensor's conversion. In a
    plain one the valid tokens: of inputs, which are then converted where they have 16 bit, and of outputs, with their
    squares.
    """
    facts, b = job.facts, job.value_bytes
    h, m = facts.hidden_size, facts.block.mlp_width
    live = LIVE[facts.block.mlp_style]
    if job.finds_bases_in_pass:
        tokens: float = job.tokens
        inputs = outputs = FLOAT32_BYTES + job.extra_float32_bytes
    else:
        tokens = job.tokens / job.streams
        inputs = FLOAT32_BYTES + (b if job.extra_float32_bytes else 0)
        outputs = 2 * FLOAT32_BYTES
    wide = tokens * job.mlp_share
    held = (live.around * tokens + tokens - wide) * h * b + _kept_scores(job)
    mask = _mask_bytes(job)
    if not job.trains_only_writers:
        first = held + wide * m * (live.first * b + live.outputs * outputs)
        yield Moment(name="MLP's first layers, finding bases", activations=first, mask=mask)
    last = held + wide * (m * (live.last * b + inputs) + h * (b + FLOAT32_BYTES / 2))
    yield Moment(name="MLP's last layer, finding bases", activations=last, mask=mask)


def _at_layer(
    job: Job,
    name: str,
    *,
    live: float,  # bytes, the layer's output among them
    shape: tuple[int, int],  # (out_features, in_features)
    writes: bool,  # to the residual stream
) -> Moment:
    """A layer at work: its noise, and in float16 the weight that is held in float32 to be written to."""
    converted = shape[0] * shape[1] * job.value_bytes if job.opened and job.dtype == "float16" else 0
    noise = layer_noise(job, shape[0], writes=writes, output_bytes=job.tokens * shape[0] * job.value_bytes)
    return Moment(name=name, activations=live + converted, mask=_mask_bytes(job), noise=noise)


def _outer(job: Job) -> float:
    """Tensors of width h that stand while attention works: embeddings, the block's input, the normed input."""
    return 4 if job.facts.block.positions_by_row else 3


def _projections(job: Job) -> tuple[int, int]:
    """Tensors of width q, and of width kv, at attention's end: its output, and what it was computed from."""
    block = job.facts.block
    return (3, 3) if block.fused_qkv and block.rotary else (2, 2)


def _kept_scores(job: Job) -> float:
    """Bytes of the scores that stand until the block's end, where attention keeps them; their tangents too."""
    if not job.facts.block.keeps_scores:
        return 0
    return job.rows * job.facts.n_heads * job.row_tokens**2 * job.value_bytes


def _queries_at_once(job: Job) -> int:
    """The tokens of a row whose scores exist at the same time."""
    return min(job.row_tokens, CAPPED_QUERIES) if job.facts.block.caps_scores else job.row_tokens


def _mask_bytes(job: Job) -> float:
    """The mask that stands through a pass: none, since padding comes last and causality needs none.

    A window needs one where rows are as long: a byte for each pair of tokens, for all rows together. Attention that is
    written out adds a number of the compute dtype for each pair, in each row.
    """
    block, pairs = job.facts.block, job.row_tokens**2
    windowed = block.window is not None and job.row_tokens >= block.window
    if block.keeps_scores:
        return (job.rows / 2 if job.exact else job.rows) * pairs * job.value_bytes * (1 + windowed)
    return pairs * windowed
