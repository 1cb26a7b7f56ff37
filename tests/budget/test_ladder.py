"""The words for a rung."""

from agzo_edge.budget.ladder import rung_words
from agzo_edge.config import config_from


def test_a_rung_that_undoes_a_piece_says_so() -> None:
    pieces = config_from({"mlp_chunk_tokens": 64, "fuse_signs": False, "micro_batch_size": 2})
    assert rung_words(pieces, config_from({})) == (
        "the whole batch at once, both signs in one pass, MLPs over all tokens at once"
    )
    assert rung_words(pieces, pieces) == "as asked for"
