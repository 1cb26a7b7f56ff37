"""Bytes of one layer's noise: while it is drawn, and in a pass beside the layer's output."""

from agzo_edge.budget.job import FLOAT32_BYTES, Job, folded_rank

SIGN_ENTRY_BYTES = 0.75  # packed bits, the words they came from, the index of each byte's eight signs
GAUSSIAN_ENTRY_BYTES = 40  # float64 words, uniforms, radius, angle and values, on the CPU


def drawn_noise(job: Job, out_features: int, *, directions: int, value_bytes: int) -> float:
    """Bytes of one layer's noise while it is drawn: out x rank entries for each direction, and what makes them."""
    entries = directions * out_features * job.config.rank
    if job.config.noise == "sign":
        return entries * (value_bytes + SIGN_ENTRY_BYTES)
    converted = value_bytes if value_bytes < FLOAT32_BYTES else 0
    return entries * max(GAUSSIAN_ENTRY_BYTES if job.on_cpu else 0, FLOAT32_BYTES + converted)


def layer_noise(job: Job, out_features: int, *, writes: bool, output_bytes: float) -> float:
    """Bytes of one layer's noise in a pass, beside its output, at its fullest.

    A guided layer's is made of its coordinates: their multiples in float32, as they are computed with, and beside
    those of the window. Full noise is drawn for each example and copied to the example's rows; in float32 each stream
    then gets its own multiple, and all of them are joined. That is before the output is there, unless folded windows
    have been summed into it, or a basis is found in this pass. (A GPU's kernel reads packed signs, and takes less.)
    """
    b, streams = job.value_bytes, 1 if job.exact else job.streams
    if job.guided and writes:
        return job.tokens * job.config.rank * (FLOAT32_BYTES + 3 * b)
    if job.trains_only_writers and not writes:
        return 0
    of_rows = job.rows / job.streams * out_features * job.config.rank * b
    gaussian = job.config.noise == "gaussian"
    stored = job.pass_directions * out_features * job.config.rank * FLOAT32_BYTES if gaussian else 0
    drawn = drawn_noise(job, out_features, directions=job.pass_directions, value_bytes=b)
    if b < FLOAT32_BYTES:
        joining = joined = stored + of_rows
    else:
        joining, joined = stored + of_rows * (1 + 2 * streams), stored + of_rows * (1 + streams)
    fullest = max(drawn + (0 if gaussian else of_rows), joining)
    if job.finds_bases_in_pass or (folded_rank(job) > 0 and not job.opened):
        return fullest
    return max(joined, fullest - output_bytes)
