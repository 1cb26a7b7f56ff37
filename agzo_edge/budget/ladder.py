"""The ladder: ways to take the same step in less memory, those that cost least time first.

Every rung computes the same estimate from the same noise; only the order of summation differs, and, in a step
that opens a window, O(mu²) (docs/decisions/0002).
"""

from collections.abc import Iterator
from typing import Any

from agzo_edge.config import RunConfig
from agzo_edge.units import MIB, format_bytes

SMALLEST_LOGITS_CHUNK = 4 * MIB  # 3 to 7 positions of a large vocabulary: below it the head is read too often
SMALLEST_MLP_CHUNK = 128  # tokens: below it the MLP's weights are read more than they are used

OFFLOADS = ("none", "embeddings", "layers")
_ALLOWED = {"shrink": OFFLOADS[:2], "stream": OFFLOADS}  # beside what was asked for


def ladder(config: RunConfig, *, row_tokens: int) -> Iterator[RunConfig]:
    """The run as `config` asks for it, then what `on_overflow` allows, each rung in less working memory.

    Micro-batches down to one example, one sign after the other, smaller chunks of logits, MLPs over a part of
    `row_tokens`, the longest row's; then all of it again with the embeddings and head, and at last the layers,
    outside the device: with those out of the way the batch may be whole again.
    """
    yield config
    if config.on_overflow == "fail":
        return
    yield from _in_smaller_pieces(config, row_tokens)
    for offload in OFFLOADS[OFFLOADS.index(config.offload) + 1 :]:
        if offload in _ALLOWED[config.on_overflow]:
            outside = config.model_copy(update={"offload": offload})
            yield outside
            yield from _in_smaller_pieces(outside, row_tokens)


def _in_smaller_pieces(config: RunConfig, row_tokens: int) -> Iterator[RunConfig]:
    """Ever smaller pieces, each rung keeping what the one before it changed."""
    for size in halvings(config.micro_batch_size or config.batch_size, at_least=1):
        config = config.model_copy(update={"micro_batch_size": size})
        yield config
    if config.fuse_signs and config.difference != "exact":
        config = config.model_copy(update={"fuse_signs": False})
        yield config
    logits_chunk, mlp_chunk = config.logits_chunk, config.mlp_chunk_tokens or row_tokens
    while logits_chunk >= 4 * SMALLEST_LOGITS_CHUNK or mlp_chunk >= 2 * SMALLEST_MLP_CHUNK:
        changes: dict[str, Any] = {}
        if logits_chunk >= 4 * SMALLEST_LOGITS_CHUNK:
            changes["logits_chunk"] = logits_chunk = logits_chunk // 4
        if mlp_chunk >= 2 * SMALLEST_MLP_CHUNK:
            changes["mlp_chunk_tokens"] = mlp_chunk = mlp_chunk // 2
        config = config.model_copy(update=changes)
        yield config


def halvings(size: int, *, at_least: int) -> Iterator[int]:
    """size/2, size/4, ... down to `at_least`."""
    while size // 2 >= at_least:
        size //= 2
        yield size


def rung_words(asked: RunConfig, rung: RunConfig) -> str:
    """What a rung does otherwise than the run that was asked for, for a person; "as asked for" when nothing."""
    changed = {name for name in RunConfig.model_fields if getattr(asked, name) != getattr(rung, name)}
    micro, mlp = rung.micro_batch_size, rung.mlp_chunk_tokens
    words = {
        "micro_batch_size": f"micro-batches of {micro}" if micro else "the whole batch at once",
        "fuse_signs": "both signs in one pass" if rung.fuse_signs else "one sign after the other",
        "logits_chunk": f"logits in chunks of {format_bytes(rung.logits_chunk)}",
        "mlp_chunk_tokens": f"MLPs over {mlp} tokens at a time" if mlp else "MLPs over all tokens at once",
        "offload": {
            "none": "everything on the device",
            "embeddings": "embeddings and head outside the device",
            "layers": "layers streamed",
        }[rung.offload],
    }
    return ", ".join(text for name, text in words.items() if name in changed) or "as asked for"
