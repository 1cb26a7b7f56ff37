"""Which layers a run trains: its own choice is those that write to the residual stream.

What they put out is added to the hidden states as it is. They have half of a model's noise entries or fewer, learn text
better than all layers together, and can be guided (docs/decisions/0031 and 0032).
"""

import re
from collections.abc import Iterable, Sequence

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head

# The last part of their names in transformers' models: of attention, and of the MLP.
_ATTENTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo")
_MLP = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "fc_out")

_STATE_SPACE = re.compile(r"\.mamba\.")  # as Falcon H1, Granite 4, Bamba and Jamba name them

_BESIDE_TEXT = re.compile(r"vision|visual|audio|multi_modal")  # towers of Gemma 3, Qwen3.5 and the like


def is_beside_text(name: str) -> bool:
    """Whether the layer or tensor of this path is for images or sound: no text passes it, and it stays in its file."""
    return _BESIDE_TEXT.search(name) is not None


def is_in_state_space(name: str) -> bool:
    """Whether the layer of this path is in a state-space mixer, whose kernels read its weight: it is left as it is."""
    return _STATE_SPACE.search(name) is not None


def writes_to_residual(name: str) -> bool:
    """Whether the layer with this path does."""
    return name.rpartition(".")[2] in {*_ATTENTION, *_MLP}


def targets_among(names: Iterable[str], wanted: Sequence[str] | None) -> tuple[set[str], list[str]]:
    """The layers of these names to train, and what of `wanted` matches none.

    Those whose path ends in one of `wanted`, or all for ALL_LINEAR; where nothing is wanted, those that write to the
    residual stream, or all where none is known to.
    """
    every = set(names)
    if not wanted:
        return {name for name in every if writes_to_residual(name)} or every, []
    matches = {w: every if w == ALL_LINEAR else {n for n in every if f".{n}".endswith(f".{w}")} for w in wanted}
    return set().union(*matches.values()), [w for w, found in matches.items() if not found]
