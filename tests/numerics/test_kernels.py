"""The Triton kernels against torch's products: in Triton's interpreter everywhere, compiled where there is a GPU."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agzo_edge.numerics.basis import next_basis, starting_basis
from agzo_edge.numerics.compiled import kernel_fault
from agzo_edge.numerics.estimate import gradient_estimate
from agzo_edge.numerics.noise import Noise, draw_noise, guided_noise
from agzo_edge.numerics.perturb import perturbed_product

pytest.importorskip("triton", reason="Triton is made for Linux")
NAME = "agzo_edge.numerics.kernels"
KEY = {"seed": 7, "step": 3, "layer": 5, "first_example": 0}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SOME = settings(max_examples=25)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The kernels as Triton's interpreter runs them, in a module of their own: on a GPU others want compiled ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, NAME, raising=False)
        module = importlib.import_module(NAME)
        del sys.modules[NAME]
    return module


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Inputs of a perturbed product, of any shape, streams and dtype, with what may be left out or not."""
    rows, tokens, out_features = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 140))
    rank, examples = draw(st.integers(1, 16)), draw(st.integers(1, 3))
    factors = draw(st.sampled_from([(0.03, -0.03), (0.03, 0.0), (1.0,)]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    n_rows = len(factors) * rows
    return {
        "coordinates": normal(rank, n_rows, tokens).permute(1, 2, 0).to(dtype),  # strided, as `projected` leaves it
        "noise": draw(
            st.sampled_from(
                [
                    draw_noise("sign", (examples, out_features, rank), **KEY),
                    guided_noise("sign", examples, normal(out_features, rank), **KEY),
                    guided_noise("gaussian", examples, normal(out_features, rank), **KEY),
                ]
            )
        ),
        "example": torch.randint(examples, (rows,), generator=generator),
        "factors": factors,
        "coefficients": draw(st.sampled_from([None, 0.1 * normal(out_features, rank)])),
        "onto": draw(st.sampled_from([None, normal(n_rows, tokens, out_features).to(dtype)])),
    }


def copied(case: dict) -> dict:
    """The case with an output of its own to add to."""
    return case | {"onto": None if case["onto"] is None else case["onto"].clone()}


@SOME
@given(case=cases())
def test_the_kernel_is_the_batched_product_for_any_shape_and_dtype(kernels: ModuleType, case: dict) -> None:
    expected = perturbed_product(**copied(case))
    by_kernel = kernels.perturbed_product(**copied(case))
    assert by_kernel.dtype is expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    assert_close(by_kernel, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@SOME
@given(case=cases())
def test_torchs_way_is_a_dense_change_of_each_rows_weight(case: dict) -> None:
    noise = case["noise"].dense()
    learned = torch.zeros(noise.shape[1:]) if case["coefficients"] is None else case["coefficients"]
    rows = [learned + factor * noise[example] for factor in case["factors"] for example in case["example"]]
    expected = torch.einsum("ntr,nor->nto", case["coordinates"].float(), torch.stack(rows))
    if case["onto"] is not None:
        expected += case["onto"].float()
    got = perturbed_product(**copied(case))
    tolerance = TOLERANCE[got.dtype]
    assert_close(got.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@SOME
@given(examples=st.integers(1, 5), out_features=st.integers(1, 700), rank=st.integers(1, 16), seed=st.integers(0, 99))
def test_the_update_kernel_is_the_weighted_sum_of_the_signs(
    kernels: ModuleType, examples: int, out_features: int, rank: int, seed: int
) -> None:
    noise = draw_noise("sign", (examples, out_features, rank), **KEY)
    weighted = torch.randn(examples, generator=torch.Generator().manual_seed(seed))
    by_kernel = kernels.weighted_signs(noise.stored, weighted, shape=noise.shape[1:])
    assert_close(by_kernel, gradient_estimate(noise, weighted), rtol=1e-5, atol=1e-5)


def products(features: int, rank: int, *, tokens: int) -> torch.Tensor:
    """What a subspace iteration makes of random tokens: with fewer than `rank` its columns are not independent."""
    inputs = torch.randn(tokens, features, generator=torch.Generator().manual_seed(features))
    return (inputs @ starting_basis(features, rank)).mT @ inputs


@SOME
@given(features=st.integers(1, 90), rank=st.integers(1, 16), tokens=st.integers(1, 30), strided=st.booleans())
def test_the_kernels_basis_is_torchs(kernels: ModuleType, features: int, rank: int, tokens: int, strided: bool) -> None:
    rank = min(rank, features)
    product = products(features, rank, tokens=tokens).mT
    found = kernels.next_basis(product if strided else product.contiguous(), starting_basis(features, rank))
    assert found.is_contiguous()
    assert_close(found.mT @ found, torch.eye(rank), rtol=0, atol=2e-5)
    assert_close(found, next_basis(product, starting_basis(features, rank)), rtol=0, atol=2e-2 / tokens)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy; a GPU does not mind
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, 0.0])
def test_the_kernel_keeps_the_basis_where_there_is_nothing_to_follow(kernels: ModuleType, bad: float) -> None:
    previous = starting_basis(40, 4)
    product = torch.zeros(40, 4)
    product[3, 2] = bad
    kept = kernels.next_basis(product, previous)
    assert_close(kept, next_basis(product, previous) if bad != 1e30 else previous, rtol=0, atol=1e-6)
    product = previous[:, [1, 1, 2, 3]]  # the first takes the second's old place
    found = kernels.next_basis(product, previous)
    assert_close(found.mT @ found, torch.eye(4), rtol=0, atol=1e-5)
    assert_close(found[:, [0, 2, 3]], previous[:, [1, 2, 3]], rtol=0, atol=1e-5)


def test_kernels_are_used_only_where_they_give_torchs_numbers(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.require_torchs_numbers(torch.device("cpu"))
    for name, kernel in (("weighted_signs", "update"), ("perturbed_product", "branch"), ("next_basis", "basis")):
        with monkeypatch.context() as patch:
            right = getattr(kernels, name)
            patch.setattr(kernels, name, lambda *given, right=right, **named: right(*given, **named) + 0.01)
            with pytest.raises(ArithmeticError, match=kernel):
                kernels.require_torchs_numbers(torch.device("cpu"))


def test_where_triton_cannot_compile_its_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_fault.cache_clear()
    assert "Error" in str(kernel_fault(torch.device("cpu")))  # no driver for a CPU
    kernel_fault.cache_clear()
    monkeypatch.setattr("agzo_edge.numerics.compiled.find_spec", lambda _name: None)
    assert kernel_fault(torch.device("cpu")) == "Triton is not installed"
    kernel_fault.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_work_on_this_machines_card() -> None:
    assert kernel_fault(torch.device("cuda", 0)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("features", "rank", "tokens"), [(1, 1, 5), (33, 8, 3), (1024, 8, 100), (14_336, 16, 500)])
def test_compiled_for_the_gpu_the_basis_is_the_cpus(features: int, rank: int, tokens: int) -> None:
    product, previous = products(features, rank, tokens=tokens).mT, starting_basis(features, rank)
    found = next_basis(product.cuda(), previous.cuda()).cpu()
    assert_close(found.mT @ found, torch.eye(rank), rtol=0, atol=2e-5)
    assert_close(found, next_basis(product, previous), rtol=0, atol=1e-3)
    product[0, 0] = float("nan")
    assert_close(next_basis(product.cuda(), previous.cuda()).cpu(), previous, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rank", [1, 3, 4, 16])
def test_compiled_for_the_gpu_it_gives_the_cpus_numbers(dtype: torch.dtype, rank: int, guided: bool) -> None:
    noise = draw_noise("sign", (5, 1000, rank), **KEY)
    if guided:
        noise = guided_noise("sign", 5, torch.randn(1000, rank), **KEY)
    coordinates, learned = torch.randn(10, 77, rank), 0.1 * torch.randn(1000, rank)
    inputs = {"example": torch.tensor([4, 0, 3, 1, 2]), "coefficients": learned}
    expected = perturbed_product(coordinates, noise, factors=(0.03, -0.03), **inputs)
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    gpu_noise = Noise(noise.shape, noise.stored.cuda(), None if noise.guide is None else noise.guide.cuda())
    got = perturbed_product(coordinates.cuda().to(dtype), gpu_noise, factors=(0.03, -0.03), **on_gpu)
    assert_close(got.cpu().float(), expected, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    weighted = torch.randn(5)
    assert_close(gradient_estimate(gpu_noise, weighted.cuda()).cpu(), gradient_estimate(noise, weighted))
