"""Which layers write to the residual stream: what they put out is added to the hidden states as it is."""

from collections.abc import Iterable

# The last part of their names in transformers' models: of attention, and of the MLP.
_ATTENTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo")
_MLP = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "fc_out")


def writes_to_residual(name: str) -> bool:
    """Whether the layer with this path does."""
    return name.rpartition(".")[2] in {*_ATTENTION, *_MLP}


def default_targets(names: Iterable[str], *, guide: str) -> set[str]:
    """The layers that a run trains where it names none: with a guide those that it can lead, else all."""
    every = set(names)
    return {name for name in every if writes_to_residual(name)} or every if guide == "head" else every
