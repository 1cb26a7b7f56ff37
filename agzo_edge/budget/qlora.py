"""What the same job would need with QLoRA, so that people can choose: by formula, nothing of it was measured.

Source: QLoRA, arXiv 2305.14314: a base in NF4 with double quantization, LoRA on every linear layer, gradient
checkpointing, an 8-bit optimizer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from agzo_edge.budget.facts import input_groups
from agzo_edge.budget.job import FLOAT32_BYTES, Job

BASE_BITS = 4.127  # of a weight: 4, 8/64 for its scale, 32/(64 x 256) for the scale's own. Source: section 3
MOMENTS_BYTES = 2  # two of an 8-bit Adam; their scales, a 64th of that, are left out


class QloraNeed(NamedTuple):
    """The device memory of a QLoRA run over the same rows and layers, with an adapter of the same rank."""

    parts: Mapping[str, int]  # bytes by name, with as many examples in a pass as the run has
    smallest_bytes: int  # the peak with one example in a pass

    @property
    def total_bytes(self) -> int:
        """The peak with as many examples in a pass as the run has."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON; every amount in bytes."""
        return {"total_bytes": self.total_bytes, "smallest_bytes": self.smallest_bytes, "parts": dict(self.parts)}


def qlora_need(job: Job) -> QloraNeed:
    """What QLoRA needs for `job`, at the least: small tensors and the allocator's slack are left out.

    base         4.127 bit for each weight of the linear layers; embeddings, head and norms in the compute dtype
    adapter      (out + in) x rank of each layer x 10 B: float32 weights and gradients, two 8-bit moments
    checkpoints  tokens x hidden x blocks: each block's input, kept until the backward pass comes by
    block        tokens x (inputs + outputs of one block's layers): what its second forward keeps
    logits       tokens x vocabulary x 8 B: float32 logits of every position, and their gradient
    workspace    the largest layer, dequantized
    """
    rows = job.rows // job.streams
    held = _held(job)
    return QloraNeed(
        parts=held | _kept(job, rows=rows),
        smallest_bytes=sum((held | _kept(job, rows=rows // job.micro_examples)).values()),
    )


def _held(job: Job) -> dict[str, int]:
    """What is there whatever the batch."""
    facts = job.facts
    weights = [out * inp for out, inp in facts.linears.values()]
    others = facts.embedding_entries + facts.head_entries + facts.other_entries
    n_adapter = job.config.adapter_rank * sum(out + inp for out, inp in facts.linears.values())
    return {
        "base": round(sum(weights) * BASE_BITS / 8) + others * job.value_bytes,
        "adapter": n_adapter * (2 * FLOAT32_BYTES + MOMENTS_BYTES),
        "workspace": max(weights) * job.value_bytes,
        "context": job.profile.context_overhead,
    }


def _kept(job: Job, *, rows: int) -> dict[str, int]:
    """What a forward over `rows` rows keeps for its backward."""
    facts, tokens = job.facts, rows * job.row_tokens
    widths = sum(input_groups(facts.linears).values()) + sum(out for out, _ in facts.linears.values())
    return {
        "checkpoints": tokens * facts.hidden_size * facts.n_layers * job.value_bytes,
        "block": tokens * widths * job.value_bytes // facts.n_layers,
        "logits": tokens * facts.vocab_size * 2 * FLOAT32_BYTES,
    }
