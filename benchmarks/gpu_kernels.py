"""Times of the parts of a layer by themselves, with the bytes and operations that they get through."""

import importlib.util

import torch
from gpu_measure import Row, Rows, Run, attempted, in_turns, timing
from gpu_models import Setting
from torch import Tensor

from agzo_edge.model.device import chosen_dtype
from agzo_edge.model.weights import DenseWeight, quantized
from agzo_edge.model.workspace import Workspace
from agzo_edge.numerics.basis import projected
from agzo_edge.numerics.estimate import gradient_estimate
from agzo_edge.numerics.noise import Noise, draw_noise
from agzo_edge.numerics.perturb import perturbed_product

RANKS = (1, 4, 16)
LAYERS = ((4096, 4096), (14_336, 4096), (4096, 14_336))  # (out, in) of an 8B Llama
SMALL_LAYERS = ((352, 128),)
REPETITIONS = 20
MU = 1e-3


def kernels(setting: Setting) -> Rows:
    """Each part at each layer shape, number of rows and rank.

    GB/s counts every tensor read or written once. Inputs are not changed between calls, so what is smaller than the
    device's cache comes from there: only rows with much more than that say something of the memory.
    """
    for out_features, in_features in SMALL_LAYERS if setting.small else LAYERS:
        for tokens in (64,) if setting.small else (2, 8, 256, 1024, 8192):
            about = {"out": out_features, "in": in_features, "rows_x_tokens": tokens}
            layer = _Layer(setting, out_features, in_features, tokens=tokens)
            yield from layer.base_parts(about)
            for rank in RANKS[1:2] if setting.small else RANKS:
                yield from layer.branch_parts(about | {"rank": rank}, rank=rank)
            del layer


class _Layer:
    """One quantized layer with inputs for it."""

    def __init__(self, setting: Setting, out_features: int, in_features: int, *, tokens: int) -> None:
        self.setting = setting
        self.dtype = chosen_dtype("auto", setting.device)
        dense = self.normal(out_features, in_features) * 0.02
        self.weight = quantized(
            DenseWeight(dense), setting.config(), device=setting.device, dtype=self.dtype, workspace=Workspace()
        )
        self.x = self.normal(2, max(1, tokens // 2), in_features)  # both signs of one example

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.setting.device).to(self.dtype)

    def base_parts(self, about: Row) -> Rows:
        """Dequantization, the matmul, and both as bitsandbytes' own layer does them."""
        out_features, in_features = self.weight.shape
        stored = sum(tensor.nbytes for _, tensor in self.weight.stored())
        n_rows, dense = self.x.numel() // in_features, self.weight.dense().clone()
        product_bytes = self.x.nbytes + n_rows * out_features * self.x.itemsize
        flops = 2 * n_rows * out_features * in_features
        parts: dict[str, tuple[Run, int, int]] = {
            "dequantize": (self.weight.dense, stored + dense.nbytes, 0),
            "matmul": (lambda: self.x @ dense.mT, dense.nbytes + product_bytes, flops),
            "dequantize + matmul": (lambda: self.x @ self.weight.dense().mT, stored + product_bytes, flops),
        }
        if self.setting.on_gpu:  # on a CPU its inference path repacks the weight (docs/decisions/0001)
            parts["bitsandbytes' matmul_4bit"] = (self._fused, stored + product_bytes, flops)
        yield from self._timed(about, parts)

    def _fused(self) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(self.x, self.weight.packed.t(), quant_state=self.weight.state)

    def branch_parts(self, about: Row, *, rank: int) -> Rows:
        """x A, the side-branch and the update, by torch's products and, on a GPU, by the kernels.

        torch's are given signs that are unpacked already.
        """
        out_features, in_features = self.weight.shape
        drawn = draw_noise("sign", (1, out_features, rank), seed=0, step=0, layer=0, first_example=0)
        noise = Noise(drawn.shape, drawn.stored.to(self.setting.device))
        dense_noise = Noise(noise.shape, noise.dense())  # not packed: takes torch's way
        basis, c = self.normal(in_features, rank), torch.randn(out_features, rank, device=self.setting.device)
        coordinates, y = projected(self.x, basis), self.normal(*self.x.shape[:-1], out_features)
        example = torch.zeros(1, dtype=torch.int64, device=self.setting.device)
        weighted = torch.ones(1, device=self.setting.device)

        def beside(of: Noise) -> Run:
            given = {"example": example, "factors": (MU, -MU), "coefficients": c, "onto": y}
            return lambda: perturbed_product(coordinates, of, **given)

        branch_bytes = 2 * y.nbytes + coordinates.nbytes + c.nbytes + noise.stored.nbytes
        parts: dict[str, tuple[Run, int, int]] = {
            "x A": (lambda: projected(self.x, basis), self.x.nbytes + basis.nbytes + coordinates.nbytes, 0),
            "branch, torch": (beside(dense_noise), branch_bytes, 0),
            "update, torch": (lambda: gradient_estimate(dense_noise, weighted), dense_noise.stored.nbytes, 0),
        }
        if self.setting.on_gpu and importlib.util.find_spec("triton"):
            parts["branch, kernel"] = beside(noise), branch_bytes, 0
            parts["update, kernel"] = (
                lambda: gradient_estimate(noise, weighted),
                noise.stored.nbytes + c.nbytes,
                0,
            )
        else:
            yield about | {"part": "branch, kernel", "not_run": "needs a CUDA device and Triton"}
        yield from self._timed(about, parts)

    def _timed(self, about: Row, parts: dict[str, tuple[Run, int, int]]) -> Rows:
        def measured() -> Row:
            return in_turns(self.setting, {name: run for name, (run, _, _) in parts.items()}, repetitions=REPETITIONS)

        times = attempted(self.setting, {}, measured)
        if "not_run" in times:
            yield about | times
            return
        for name, (_, n_bytes, flops) in parts.items():
            least_s = min(times[name])
            rate = {"gb_per_s": n_bytes / least_s / 1e9} | ({"tflop_per_s": flops / least_s / 1e12} if flops else {})
            yield about | {"part": name} | timing(times[name]) | rate
