"""The rungs, and the words for one."""

import pytest

from agzo_edge.budget.ladder import ladder, rung_words
from agzo_edge.config import config_from


def test_a_rung_that_undoes_a_piece_says_so() -> None:
    pieces = config_from({"mlp_chunk_tokens": 64, "fuse_signs": False, "micro_batch_size": 2})
    assert rung_words(pieces, config_from({})) == (
        "the whole batch at once, both signs in one pass, MLPs over all tokens at once"
    )
    assert rung_words(pieces, pieces) == "as asked for"


@pytest.mark.parametrize("offload", ["none", "embeddings", "layers"])
def test_the_run_shrinks_wherever_it_was_asked_to_keep_its_weights(offload: str) -> None:
    config = config_from({"offload": offload, "on_overflow": "shrink", "batch_size": 8})
    rungs = list(ladder(config, row_tokens=512))
    assert [rung.micro_batch_size for rung in rungs[:4]] == [None, 4, 2, 1]
    assert {rung.offload for rung in rungs} == ({"none", "embeddings"} if offload == "none" else {offload})
    fixed = config.model_copy(update={"on_overflow": "fail"})
    assert list(ladder(fixed, row_tokens=512)) == [fixed]
