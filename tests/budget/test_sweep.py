from itertools import pairwise

from checkpoints import llama_facts

from agzo_edge.budget.memory import predicted_memory
from agzo_edge.budget.profile import load_profile
from agzo_edge.budget.sweep import BATCHES, LENGTHS, Sweep, memory_sweep
from agzo_edge.config import RunConfig, config_from

FACTS = llama_facts(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=8000)
GPU = load_profile("gtx-1650-4gb")
RANKS = {"fits": 0, "in pieces": 1, "refused": 2}


def swept(**settings: object) -> tuple[RunConfig, Sweep]:
    config = config_from({"vram_limit": "400MiB", "micro_batch_size": 8, **settings})
    return config, memory_sweep(FACTS, config, GPU)


def test_a_sweep_has_a_cell_for_each_length_and_batch_and_all_three_outcomes() -> None:
    _, sweep = swept()
    sizes = [(cell.max_seq_length, cell.batch_size) for cell in sweep.cells]
    assert sizes == [(length, batch) for length in LENGTHS for batch in BATCHES]
    assert {cell.outcome for cell in sweep.cells} == set(RANKS)


def test_a_cell_is_the_plan_of_its_run() -> None:
    config, sweep = swept()
    for cell in sweep.cells:
        size = {"max_seq_length": cell.max_seq_length, "batch_size": cell.batch_size}
        run = config.model_copy(update={**size, "micro_batch_size": min(8, cell.batch_size)})
        plan = predicted_memory(FACTS, run, GPU)
        assert cell.asked_bytes == plan.device_bytes
        assert (cell.outcome == "fits") == plan.fits
        assert (cell.device_bytes <= sweep.limit_bytes) == (cell.outcome != "refused")
        assert bool(cell.how) == (cell.outcome == "in pieces")


def test_longer_rows_never_fit_better() -> None:
    _, sweep = swept()
    for batch in BATCHES:
        outcomes = [RANKS[cell.outcome] for cell in sweep.cells if cell.batch_size == batch]
        assert all(shorter <= longer for shorter, longer in pairwise(outcomes))


def test_a_run_that_must_not_shrink_fits_or_is_refused() -> None:
    _, sweep = swept(on_overflow="fail")
    assert {cell.outcome for cell in sweep.cells} == {"fits", "refused"}
