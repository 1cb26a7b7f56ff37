import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LLAMA, facts_by_headers, llama_facts, llama_shapes
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.budget.detect import DiskRoom, disk_bytes_for
from agzo_edge.budget.held import CPU_COLUMNS
from agzo_edge.budget.job import DataShape, layer_bytes
from agzo_edge.budget.memory import MemoryPlan, job_of, predicted_memory
from agzo_edge.budget.plan import fitted_run, memory_plan, require_fits
from agzo_edge.budget.profile import Profile, load_profile
from agzo_edge.budget.sweep import memory_sweep
from agzo_edge.budget.working import CPU_KEPT_KERNELS, CPU_ROWS, GUIDE_COPIES, GUIDE_PIECES, moments
from agzo_edge.config import RunConfig, config_from
from agzo_edge.errors import BudgetError, ConfigError, ModelError
from agzo_edge.model.memory import KEPT_MATMULS
from agzo_edge.numerics.loss import GRADIENT_PIECES
from agzo_edge.numerics.products import BLOCK_ROWS, WIDTH
from agzo_edge.rundir import JOURNAL_NAME
from agzo_edge.units import GIB, MIB

FACTS = llama_facts()
WIDE = llama_facts(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16, vocab_size=32_000
)
CPU, GPU, OLD_GPU = load_profile("cpu"), load_profile("rtx-3060-12gb"), load_profile("t4-16gb")


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Any run whose settings change the plan."""
    bits = draw(st.sampled_from([4, 8, 16]))
    return config_from({
        "batch_size": draw(st.integers(1, 64)),
        "max_seq_length": draw(st.integers(2, 4096)),
        "rank": draw(st.integers(1, 64)),
        "adapter_rank": draw(st.integers(1, 128)),
        "refresh_every": draw(st.integers(0, 50)),
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "double_quant": draw(st.booleans()),
        "target": draw(st.sampled_from(["adapter", "dequantized"])),
        "difference": draw(st.sampled_from(["central", "forward", "exact"])),
        "directions": draw(st.sampled_from(["example", "shared"])),
        "noise": draw(st.sampled_from(["sign", "gaussian"])),
        "optimizer": draw(st.sampled_from(["sgd", "momentum", "adam", "sign"])),
        "guide": draw(st.sampled_from(["none", "head"])),
    })  # fmt: skip


def component(plan: MemoryPlan, name: str, where: str = "device") -> int:
    return next(part.n_bytes for part in plan.components if (part.name, part.where) == (name, where))


@given(config=configs(), profile=st.sampled_from([CPU, GPU, OLD_GPU]))
def test_no_component_is_ever_negative_and_the_plan_is_json(config: RunConfig, profile: Any) -> None:
    plan = memory_plan(FACTS, config, profile)
    assert all(part.n_bytes >= 0 for part in plan.components)
    assert all(change.saved_bytes > 0 for change in plan.changes)
    assert len(plan.changes) <= 3
    assert json.loads(json.dumps(plan.to_dict()))["device_bytes"] == plan.device_bytes


@given(config=configs(), profile=st.sampled_from([CPU, GPU]), more=st.integers(1, 40))
@pytest.mark.parametrize("field", ["batch_size", "max_seq_length", "rank", "adapter_rank"])
def test_more_of_a_setting_never_needs_less_memory(field: str, config: RunConfig, profile: Any, more: int) -> None:
    if field == "rank":  # how wide the folded windows get depends on how many fit into the adapter's rank
        config = config.model_copy(update={"refresh_every": 0})
    larger = config.model_copy(update={field: getattr(config, field) + more})
    assert (
        predicted_memory(FACTS, larger, profile).device_bytes >= predicted_memory(FACTS, config, profile).device_bytes
    )


def test_a_guide_keeps_guesses_and_takes_no_more_logits_than_a_step() -> None:
    settings = {"logits_chunk": 2**20, "batch_size": 4, "max_seq_length": 256, "rank": 4}
    plain, guided = (job_of(WIDE, config_from({**settings, **more}), CPU) for more in ({"guide": "none"}, {}))
    guide = next(moment for moment in moments(guided) if moment.name == "guide")
    kept = 4 * 16 * 1024 * 4 + 16 * 4 * 256 * 4 * 4  # 16 layers: guesses, coordinates
    assert guide.activations == kept + 4 * 256 * 1024 * (3 * 4 + 4)
    in_chunk = 2**20 // (4 * 32_000)
    assert guide.logits == -(-in_chunk // GRADIENT_PIECES) * 32_000 * 4 * GUIDE_COPIES
    assert guide.logits < next(moment for moment in moments(plain) if moment.name == "logits").logits
    assert GUIDE_PIECES == GRADIENT_PIECES
    assert all("guid" not in moment.name for moment in moments(plain))
    apart = job_of(WIDE, config_from({**settings, "fuse_signs": False}), CPU)
    assert any(moment.name.endswith(", guiding") for moment in moments(apart))


@given(config=configs(), size=st.integers(1, 64))
def test_a_micro_batch_never_needs_more_than_the_batch(config: RunConfig, size: int) -> None:
    smaller = config.model_copy(update={"micro_batch_size": min(size, config.batch_size)})
    assert predicted_memory(FACTS, smaller, CPU).device_bytes <= predicted_memory(FACTS, config, CPU).device_bytes


def test_fewer_bits_need_fewer_bytes() -> None:
    sizes = [layer_bytes((512, 512), form, value_bytes=2) for form in ("4bit-nested", "4bit", "8bit", "dense")]
    assert sizes == sorted(sizes)
    assert sizes[1] == 512 * 512 // 2 + 4 * 512 * 512 // 64
    assert sizes[2] == 512 * 512 + 4 * 512


def test_an_exact_difference_needs_more_than_a_central_one() -> None:
    central, exact = (predicted_memory(WIDE, config_from({"difference": d}), CPU) for d in ("central", "exact"))
    assert component(exact, "activations") > component(central, "activations")
    assert component(exact, "logits chunk") == 2 * component(central, "logits chunk")


def test_dividing_the_logits_takes_one_copy_more_where_they_carry_a_tangent() -> None:
    divided = replace(WIDE, divides_logits=True)
    central, exact = (config_from({"difference": difference}) for difference in ("central", "exact"))
    plain, granite = (component(predicted_memory(facts, exact, CPU), "logits chunk") for facts in (WIDE, divided))
    assert granite * 4 == plain * 5
    assert predicted_memory(divided, central, CPU).device_bytes == predicted_memory(WIDE, central, CPU).device_bytes


def test_options_of_a_choice_are_rows() -> None:
    one, four = (memory_plan(FACTS, config_from({}), CPU, data=DataShape(rows_per_example=n)) for n in (1, 4))
    assert four.rows == 4 * one.rows
    assert component(four, "activations") == 4 * component(one, "activations")


def test_the_data_s_longest_row_counts_and_not_what_was_allowed() -> None:
    short = memory_plan(FACTS, config_from({"max_seq_length": 1024}), CPU, data=DataShape(longest_tokens=100))
    assert short.row_tokens == 100


def test_a_tied_head_saves_its_embeddings() -> None:
    tied = llama_facts(tie_word_embeddings=True)
    saved = component(memory_plan(FACTS, config_from({}), CPU), "embeddings") - component(
        memory_plan(tied, config_from({}), CPU), "embeddings"
    )
    assert saved == FACTS.vocab_size * FACTS.hidden_size * 4


@pytest.mark.parametrize(
    ("profile", "settings", "dtype"),
    [
        (CPU, {}, "float32"),
        (GPU, {}, "bfloat16"),
        (OLD_GPU, {}, "float16"),
        (GPU, {"dtype": "float32"}, "float32"),
        (GPU, {"device": "cpu"}, "float32"),
    ],
)
def test_the_compute_dtype_follows_the_machine_unless_it_is_given(profile: Any, settings: Any, dtype: str) -> None:
    assert memory_plan(FACTS, config_from(settings), profile).dtype == dtype


def test_limits_from_flags_win_over_the_profile() -> None:
    assert memory_plan(FACTS, config_from({"vram_limit": "6GiB"}), GPU).limit_bytes == 6 * GIB
    assert memory_plan(FACTS, config_from({"ram_limit": "5GiB"}), CPU).limit_bytes == 5 * GIB
    assert memory_plan(FACTS, config_from({}), GPU).limit_bytes == GPU.budget_bytes


def test_a_limit_without_a_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match="no unit"):
        config_from({"vram_limit": "6"})
    with pytest.raises(ConfigError, match="6 has no unit: write '6GiB'"):
        config_from({"vram_limit": 6})


@pytest.mark.parametrize(
    ("settings", "profile", "fault"),
    [
        ({"vram_limit": "16GiB"}, GPU, r"--vram-limit 16\.00 GiB is more than the 12\.00 GiB that profile 'rtx-3060"),
        ({"ram_limit": "20GiB"}, CPU, r"--ram-limit 20\.00 GiB is more than the 16\.00 GiB"),
        ({"device": "cuda"}, CPU, "profile 'cpu' has no GPU: use --device cpu"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(settings: Any, profile: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        memory_plan(FACTS, config_from(settings), profile)


def test_the_smaller_of_two_limits_holds_on_a_cpu_and_the_gpus_is_no_limit_of_the_host() -> None:
    both = config_from({"ram_limit": "5GiB", "vram_limit": "6GiB"})
    assert memory_plan(FACTS, both, CPU).limit_bytes == 5 * GIB
    on_gpu = memory_plan(FACTS, both, GPU)
    assert (on_gpu.limit_bytes, on_gpu.host_limit_bytes) == (6 * GIB, 5 * GIB)


def test_rows_are_no_longer_than_the_model_s_positions_and_the_plan_says_so() -> None:
    facts = llama_facts(max_position_embeddings=256)
    plan = memory_plan(facts, config_from({"max_seq_length": 1024}), CPU)
    assert plan.row_tokens == 256
    assert plan.notes == ("rows have 256 tokens at most: the model has no more positions",)
    assert memory_plan(facts, config_from({"max_seq_length": 256}), CPU).notes == ()


def test_layers_that_the_configuration_does_not_know_are_told() -> None:
    (note,) = memory_plan(replace(FACTS, n_layers=FACTS.n_layers - 1), config_from({}), CPU).notes
    assert note.startswith(f"config.json says {FACTS.n_layers - 1} layers: of the weights' {FACTS.n_layers} ")


def test_a_family_whose_activations_were_not_measured_is_told() -> None:
    (note,) = memory_plan(llama_facts(model_type="bloom"), config_from({}), CPU).notes
    assert "type 'bloom' were not measured, and the plan may be too low" in note


def test_what_peft_would_take_for_the_experts_is_told() -> None:
    expert = {f"model.layers.0.mlp.experts.0.{name}.weight": (96, 16) for name in ("gate_proj", "up_proj", "down_proj")}
    facts = facts_by_headers(LLAMA, llama_shapes() | expert)
    (note,) = memory_plan(facts, config_from({"target_modules": ["o_proj", "down_proj"]}), CPU).notes
    assert note.startswith("PEFT takes down_proj for the experts'")
    assert memory_plan(facts, config_from({"target_modules": ["o_proj"]}), CPU).notes == ()


def test_a_length_at_which_positions_turn_otherwise_is_told() -> None:
    rotary = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}
    facts = facts_by_headers(LLAMA | rotary, llama_shapes())
    (note,) = memory_plan(facts, config_from({"max_seq_length": 65}), CPU).notes
    assert "a row over 64 tokens changes how the model turns the positions" in note
    assert memory_plan(facts, config_from({"max_seq_length": 64}), CPU).notes == ()


def test_routed_experts_take_what_all_tokens_of_all_their_experts_do() -> None:
    expert = {f"model.layers.0.mlp.experts.0.{name}.weight": (96, 16) for name in ("gate_proj", "up_proj", "down_proj")}
    sizes = {"num_experts_per_tok": 4, "moe_intermediate_size": 96}
    facts = facts_by_headers(LLAMA | sizes, llama_shapes() | expert)
    job = job_of(facts, config_from({"batch_size": 2, "max_seq_length": 64}), CPU)
    routed = next(moment for moment in moments(job) if moment.name == "experts")
    assert routed.activations == 2 * 2 * 64 * (4 * 16 + 4 * (16 + 4 * 96)) * 4
    assert not [moment for moment in moments(job_of(FACTS, config_from({}), CPU)) if moment.name == "experts"]


def test_experts_are_fused_in_the_host_s_memory_on_their_way_to_a_gpu() -> None:
    expert = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": (24, 16) for n in range(8)}
    with_experts, without = (
        component(predicted_memory(facts_by_headers(LLAMA, shapes), config_from({}), GPU), "loader", "host")
        for shapes in (llama_shapes() | expert, llama_shapes())
    )
    assert with_experts - without == 8 * 24 * 16 * 2


def test_keys_and_values_out_of_a_latent_are_as_wide_as_the_queries_and_write_scores_out_on_a_cpu() -> None:
    start = "model.layers.0.self_attn"
    latent = {
        f"{start}.q_proj.weight": (48, 16),
        f"{start}.kv_a_proj.weight": (8, 16),
        f"{start}.o_proj.weight": (16, 32),
    }
    config = LLAMA | {"num_hidden_layers": 1}
    shapes = {"model.embed_tokens.weight": (50, 16), f"{start}.kv_b_proj.weight": (64, 8), **latent}
    facts = facts_by_headers(config, shapes)
    assert (facts.n_heads, facts.query_width, facts.kv_width) == (4, 48, 48)
    settings = config_from({"batch_size": 2, "max_seq_length": 64, "dtype": "float32"})
    on_cpu, on_gpu = (next(moments(job_of(facts, settings, profile))).activations for profile in (CPU, GPU))
    assert on_cpu - on_gpu == 2 * 2 * 4 * 64**2 * 2 * 4


def test_granite_4_s_shared_mlp_has_a_fused_gate() -> None:
    shapes = {name: shape for name, shape in llama_shapes().items() if ".mlp." not in name}
    for block in range(2):
        start = f"model.layers.{block}.shared_mlp"
        shapes |= {f"{start}.input_linear.weight": (128, 16), f"{start}.output_linear.weight": (16, 64)}
    block_facts = facts_by_headers(LLAMA, shapes).block
    assert (block_facts.mlp_style, block_facts.mlp_width) == ("fused gate", 64)


def test_a_scale_of_the_logits_is_one_copy_more_as_a_divisor_is() -> None:
    assert [llama_facts(**{name: 0.25}).divides_logits for name in ("logit_scale", "logits_scaling")] == [True, True]
    assert not FACTS.divides_logits


@pytest.mark.parametrize(
    ("stored_as", "settings", "flag"),
    [
        ("4bit", {"load_in_8bit": True}, "--load-in-8bit"),
        ("4bit", {"double_quant": True}, "--double-quant"),
        ("8bit", {"load_in_4bit": False}, "--no-load-in-4bit"),
    ],
)
def test_flags_that_a_saved_quantized_checkpoint_overrules_are_named(stored_as: Any, settings: Any, flag: str) -> None:
    notes = memory_plan(replace(FACTS, stored_as=stored_as), config_from(settings), CPU).notes
    assert [note.split()[0] for note in notes] == [flag]
    assert memory_plan(replace(FACTS, stored_as=stored_as), config_from({}), CPU).notes == ()


def test_a_run_that_its_disk_cannot_hold_is_refused(tmp_path: Path) -> None:
    plan = memory_plan(FACTS, config_from({"output_dir": str(tmp_path / "not" / "yet")}), CPU)
    assert plan.disk_limit_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "state").write_bytes(bytes(3 * MIB))
    assert disk_bytes_for(str(tmp_path)) == pytest.approx(shutil.disk_usage(tmp_path).free, abs=MIB)
    (tmp_path / JOURNAL_NAME).write_bytes(b"")
    own = disk_bytes_for(str(tmp_path)) - shutil.disk_usage(tmp_path).free
    assert own == pytest.approx(3 * MIB, abs=MIB), "a resumed run's own"
    assert plan.fits
    with pytest.raises(BudgetError, match=r"(?s)on the disk of its output directory.*bases.*another --output-dir"):
        require_fits(replace(plan, disk_limit_bytes=plan.bytes_on("disk") - 1))


def test_what_waits_outside_memory_is_held_against_the_disk_of_the_cache_folder(tmp_path: Path) -> None:
    config = config_from({"offload": "layers", "output_dir": str(tmp_path)})
    room = DiskRoom(run_bytes=GIB, cache_bytes=MIB, is_one_disk=False)
    plan = predicted_memory(WIDE, config, CPU, room=room)
    assert (plan.disk_limit_bytes, plan.cache_limit_bytes) == (GIB, MIB)
    with pytest.raises(
        BudgetError, match=r"what waits outside memory in .*agzo-edge, and 1\.0 MiB are free.*XDG_CACHE_HOME"
    ):
        require_fits(plan)
    on_one = predicted_memory(WIDE, config, CPU, room=DiskRoom(GIB, GIB, is_one_disk=True))
    assert on_one.cache_limit_bytes == GIB - on_one.bytes_on("disk")
    for fits_anywhere in (config.model_copy(update={"offload": "none"}), config.model_copy(update={"device": "cuda"})):
        assert predicted_memory(WIDE, fits_anywhere, GPU, room=room).cache_limit_bytes is None


def test_the_disk_is_asked_once_for_all_rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(directory: str) -> int:
        asked.append(directory)
        return GIB

    monkeypatch.setattr("agzo_edge.budget.detect.disk_bytes_for", counted)
    config = config_from({"output_dir": str(tmp_path), "on_overflow": "stream"})
    assert len(fitted_run(WIDE, config, CPU).rungs) > 5
    memory_sweep(WIDE, config, CPU)
    assert asked == [str(tmp_path)] * 2


def test_changes_are_rungs_of_the_ladder_too() -> None:
    config = config_from({"vram_limit": "1GiB", "max_seq_length": 1024, "batch_size": 1})
    plan = memory_plan(WIDE, config, GPU)
    assert {change.flags.split()[0] for change in plan.changes} & {"--no-fuse-signs", "--mlp-chunk-tokens", "--offload"}


def test_a_refusal_names_need_limit_parts_and_what_to_try() -> None:
    config = config_from({"vram_limit": "1GiB", "max_seq_length": 4096, "on_overflow": "fail"})
    plan = memory_plan(WIDE, config, GPU)
    assert not plan.fits
    with pytest.raises(
        BudgetError, match=r"(?s)allows 1\.00 GiB.*activations.*makes it fit:.*--max-seq-length \d+ \(saves"
    ):
        require_fits(plan)
    with pytest.raises(BudgetError):
        fitted_run(WIDE, config, GPU)


def test_the_first_change_offered_makes_the_plan_fit() -> None:
    config = config_from({"vram_limit": "1GiB", "max_seq_length": 1024})
    plan = memory_plan(WIDE, config, GPU)
    assert not plan.fits
    flag, value = plan.changes[0].flags.removeprefix("--").split()
    changed = config.model_copy(update={flag.replace("-", "_"): int(value)})
    after = memory_plan(WIDE, changed, GPU)
    assert after.fits
    assert plan.device_bytes - after.device_bytes == plan.changes[0].saved_bytes


def test_shrinking_takes_the_largest_micro_batch_that_fits_and_says_so() -> None:
    config = config_from({"vram_limit": "1GiB", "max_seq_length": 1024, "batch_size": 16})
    fitted = fitted_run(WIDE, config, GPU)
    size = fitted.config.micro_batch_size
    assert size is not None
    assert fitted.plan.fits
    assert f"micro-batches of {size}" in fitted.changes[0]
    twice = config.model_copy(update={"micro_batch_size": 2 * size})
    assert not memory_plan(WIDE, twice, GPU).fits


def test_a_plan_says_how_the_run_would_be_taken_that_does_not_fit_as_asked_for() -> None:
    config = config_from({"batch_size": 16, "max_seq_length": 2048, "vram_limit": "2GiB"})
    plan, fitted = memory_plan(WIDE, config, GPU), fitted_run(WIDE, config, GPU)
    assert plan.can_run
    assert not plan.fits
    assert plan.in_pieces is not None
    assert plan.in_pieces.device_bytes == fitted.plan.device_bytes
    assert plan.in_pieces.how in fitted.changes[0]
    refused = memory_plan(WIDE, config.model_copy(update={"on_overflow": "fail"}), GPU)
    assert (refused.can_run, refused.in_pieces) == (False, None)


def test_a_run_that_fits_is_left_as_it_is() -> None:
    config = config_from({})
    assert fitted_run(FACTS, config, GPU)[::2] == (config, ())


def test_weights_above_the_limit_are_refused_whatever_the_micro_batch() -> None:
    with pytest.raises(BudgetError, match=r"(?s)device memory.*No single setting makes it fit"):
        fitted_run(WIDE, config_from({"vram_limit": "500MiB"}), GPU)


def test_a_limit_below_one_layer_is_refused_with_what_that_layer_takes() -> None:
    largest = max(out * inp for out, inp in WIDE.linears.values())
    with pytest.raises(BudgetError, match="the largest layer's weights alone take 452"):
        fitted_run(WIDE, config_from({"vram_limit": "450MiB", "on_overflow": "stream"}), GPU)
    assert GPU.context_overhead + layer_bytes((1, largest), "4bit", value_bytes=2) < 453 * MIB


def test_a_host_too_small_for_the_loader_is_refused_as_host() -> None:
    plan = memory_plan(WIDE, config_from({"ram_limit": "1MiB"}), GPU)
    assert not plan.fits
    with pytest.raises(BudgetError, match="host memory") as refused:
        require_fits(plan)
    assert "the largest layer" not in str(refused.value)


def test_what_saves_memory_of_the_device_alone_is_no_advice_where_the_host_s_is_short() -> None:
    config = config_from({"offload": "layers", "vram_limit": "8GiB"})
    need = memory_plan(WIDE, config, GPU).bytes_on("host")
    plan = memory_plan(WIDE, config.model_copy(update={"ram_limit": need - 1}), GPU)
    assert plan.tightest == "host"
    assert plan.changes
    for change in plan.changes:
        assert change.flags.split()[0] not in ("--micro-batch-size", "--mlp-chunk-tokens", "--no-fuse-signs")


def test_target_modules_shrink_what_is_learned_and_a_wrong_name_is_refused() -> None:
    all_layers = memory_plan(FACTS, config_from({}), CPU)
    two = memory_plan(FACTS, config_from({"target_modules": ("q_proj", "v_proj")}), CPU)
    assert component(two, "adapter") < component(all_layers, "adapter")
    assert component(two, "weights") == component(all_layers, "weights")
    with pytest.raises(ModelError, match="no layer matches proj_q; there are down_proj"):
        memory_plan(FACTS, config_from({"target_modules": ("proj_q",)}), CPU)


def test_a_checkpoint_saved_in_4_bit_is_planned_so_whatever_the_flags_say() -> None:
    packed = replace(FACTS, stored_as="4bit")
    dense = config_from({"load_in_4bit": False})
    assert component(memory_plan(packed, dense, CPU), "weights") < component(memory_plan(FACTS, dense, CPU), "weights")


def test_planning_imports_no_torch() -> None:
    script = "import sys, agzo_edge.budget.plan, agzo_edge.budget.detect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_what_waits_outside_is_off_the_device_and_on_the_disk_or_the_host() -> None:
    usual, cpu, gpu = (
        memory_plan(WIDE, config_from({"offload": offload}), profile)
        for offload, profile in (("none", CPU), ("layers", CPU), ("layers", GPU))
    )
    weights = component(usual, "weights")
    assert component(cpu, "weights", "mapped") == component(gpu, "weights", "host") == weights
    assert component(cpu, "mapped weights", "cache") == cpu.bytes_on("mapped") > weights
    assert component(gpu, "streamed") == 2 * weights // WIDE.n_layers
    assert usual.device_bytes - cpu.device_bytes > weights


def test_on_a_board_what_waits_on_the_host_takes_the_same_memory() -> None:
    board = load_profile("jetson-orin-nano-8gb")
    for offload in ("none", "layers"):
        plan = predicted_memory(llama_facts(), config_from({"offload": offload, "device": "cuda"}), board)
        assert plan.host_limit_bytes == plan.limit_bytes - plan.device_bytes
    tight = plan.device_bytes + plan.bytes_on("host") - 1
    config = config_from({"offload": "layers", "device": "cuda", "vram_limit": tight})
    assert not predicted_memory(llama_facts(), config, board).fits
    assert predicted_memory(llama_facts(), config.model_copy(update={"vram_limit": tight + 1}), board).fits


def test_layers_that_are_written_to_are_never_outside() -> None:
    config = config_from({"offload": "layers", "target": "dequantized", "target_modules": ("all-linear",)})
    plan = memory_plan(WIDE, config, CPU)
    assert component(plan, "weights", "mapped") == 0
    assert component(plan, "opened layers") == 4 * sum(out * inp for out, inp in WIDE.linears.values())


def test_an_mlp_in_pieces_needs_less_and_opts_does_not() -> None:
    whole, pieces = ({"max_seq_length": 1024, "mlp_chunk_tokens": chunk} for chunk in (None, 128))
    of_opt = {
        field: {name.replace(".mlp.", "."): value for name, value in getattr(WIDE, field).items()}
        for field in ("linears", "tensors")
    }
    for facts, smaller in ((WIDE, True), (replace(WIDE, **of_opt), False)):
        plans = [memory_plan(facts, config_from(settings), CPU) for settings in (whole, pieces)]
        assert (component(plans[1], "activations") < component(plans[0], "activations")) is smaller


def test_weights_of_four_times_the_limit_are_streamed_or_refused() -> None:
    deep = llama_facts(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=2000
    )
    dense = {"load_in_4bit": False, "max_seq_length": 128, "batch_size": 4, "adapter_rank": 4, "refresh_every": 0}
    weights = component(memory_plan(deep, config_from(dense), CPU), "weights")
    limit = CPU.context_overhead + weights // 4
    config = config_from(dense, {"ram_limit": str(limit) + "B"})
    with pytest.raises(BudgetError):
        fitted_run(deep, config, CPU)
    fitted = fitted_run(deep, config.model_copy(update={"on_overflow": "stream"}), CPU)
    assert fitted.config.offload == "layers"
    assert "layers streamed" in fitted.changes[0]
    assert fitted.plan.fits


def test_a_run_that_must_not_shrink_has_one_rung() -> None:
    assert len(fitted_run(WIDE, config_from({"on_overflow": "fail"}), GPU).rungs) == 1
    needs = [rung.plan.device_bytes for rung in fitted_run(WIDE, config_from({"on_overflow": "stream"}), GPU).rungs]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == len(needs) > 5


def test_the_lines_of_a_large_file_are_counted_where_they_are_held() -> None:
    for profile, where in ((CPU, "device"), (GPU, "host")):
        config = RunConfig()
        with_lines = predicted_memory(FACTS, config, profile, data=DataShape(indexed_lines=2_000_000))
        assert component(with_lines, "data index", where) == 72_000_000
        assert with_lines.bytes_on(where) - predicted_memory(FACTS, config, profile).bytes_on(where) == 72_000_000


def test_the_tokenizer_and_what_data_of_the_hub_needs_are_counted_where_they_are_held(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    for profile, where in ((CPU, "device"), (GPU, "host")):
        of_file = memory_plan(FACTS, config_from({"data": str(rows)}), profile)
        of_hub = memory_plan(FACTS, config_from({"data": "someone/their-data"}), profile)
        assert component(of_file, "tokenizer", where) == 400 * FACTS.vocab_size
        assert of_hub.bytes_on(where) - of_file.bytes_on(where) == component(of_hub, "hub's library", where) > 0


def test_the_disk_holds_every_windows_bases_and_guides() -> None:
    settings = {"rank": 2, "refresh_every": 5, "max_steps": 11}
    guided, plain = (memory_plan(WIDE, config_from({**settings, "guide": g}), CPU) for g in ("head", "none"))
    inputs = 8 * (1024 + 4096)  # of o_proj and down_proj in each block
    assert component(plain, "bases", "disk") == 3 * inputs * 2 * 4
    assert component(guided, "bases", "disk") == 3 * (inputs * 2 + 8 * 2 * 1024 * 2) * 4


def test_sixteen_bit_products_on_a_cpu_leave_code_for_each_shape() -> None:
    """Those of a run that trains more layers meet more shapes; a GPU's, and float32, leave none."""
    assert (CPU_ROWS, CPU_KEPT_KERNELS) == (BLOCK_ROWS, KEPT_MATMULS)

    def slack(profile: Profile, dtype: str, *modules: str) -> int:
        return component(
            memory_plan(FACTS, config_from({"dtype": dtype, "target_modules": modules}), profile), "allocator"
        )

    one, two = (slack(CPU, "bfloat16", *modules) for modules in (["o_proj"], ["o_proj", "down_proj"]))
    assert slack(CPU, "float32", "o_proj") < one < two
    assert slack(GPU, "bfloat16", "o_proj") < slack(GPU, "float32", "o_proj")


def test_the_copy_of_the_folded_windows_is_as_wide_as_the_products_fill_it() -> None:
    """On a CPU in 16 bit: 12 columns and 4 of zeros, beside the present window's."""
    assert CPU_COLUMNS == WIDTH
    config = config_from({"rank": 4, "adapter_rank": 6, "refresh_every": 5, "dtype": "bfloat16"})
    width = sum(out + inp for out, inp in job_of(FACTS, config, CPU).targets.values())
    on_cpu, on_gpu = (component(memory_plan(FACTS, config, profile), "adapter") for profile in (CPU, GPU))
    assert on_cpu - on_gpu == width * 4 * 2


def test_linear_attention_s_chunks_are_counted_in_float32() -> None:
    sizes = {"linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 16}
    settings = {"max_seq_length": 100, "batch_size": 8, "dtype": "bfloat16", "device": "cpu"}
    names = []
    for kinds in (["linear_attention", "full_attention"], ["full_attention"] * 2):
        job = job_of(llama_facts(**sizes, layer_types=kinds), config_from(settings), CPU)
        names.append({moment.name: moment for moment in moments(job)})
    assert "linear attention" not in names[1]
    rows, chunked = 16, 16 * 128
    scan = 4 * (chunked * (5 * 32 + 4 * 16 + 3 * 64) + rows * 4 * 32 * 16) * 4
    projections = rows * 100 * (3 * llama_facts().hidden_size + 2 * 4 * (32 + 16)) * 2
    assert names[0]["linear attention"].activations == scan + projections
