"""Results do not depend on what the caller set the processor's floating-point unit to."""

import ctypes
import platform

import pytest
import torch

from fastvq import ops
from fastvq.backends import cpu as cpu_backend

pytestmark = pytest.mark.skipif(cpu_backend.unavailable() is not None, reason="needs the CPU kernels")

NEAREST = 0
DIRECTIONS = {
    "x86_64": (0x400, 0x800, 0xC00),
    "AMD64": (0x400, 0x800, 0xC00),
    "aarch64": (0x800000, 0x400000, 0xC00000),
}
DIRECTIONS["arm64"] = DIRECTIONS["aarch64"]


def _set_rounding(mode: int) -> None:
    assert ctypes.CDLL(None).fesetround(mode) == 0


def _get_rounding() -> int:
    return ctypes.CDLL(None).fegetround()


def _inputs(scale: float) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {
        "x": (900, 16), "codes": (64, 16), "levels": (3, 64, 16), "average": (64, 16), "size": (64,),
        "image": (3, 8, 9, 11), "weight": (12, 8, 3, 5), "bias": (12,), "grad": (3, 12, 9, 11),
        "grad_gated": (3, 6, 9, 11),
    }  # fmt: skip
    wide = {name: torch.randn(shape, generator=g, dtype=torch.float64) * scale for name, shape in shapes.items()}
    dtypes = torch.float32, torch.float64, torch.bfloat16
    return {f"{name} {dtype}": t.to(dtype) for name, t in wide.items() for dtype in dtypes}


def _results(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}

    def keep(name, *tensors):
        found.update({f"{name} {i}": t.detach().clone() for i, t in enumerate(tensors) if t is not None})

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, codebook, levels = (inputs[f"{name} {dtype}"].clone() for name in ("x", "codes", "levels"))
        for estimator in ("straight_through", "rotation"):
            a, c = x.clone().requires_grad_(), codebook.clone().requires_grad_()
            q = ops.quantize(a, c, beta=0.3, estimator=estimator, backend="cpu")
            (q.quantized.sum() + 0.75 * q.commitment_loss + q.codebook_loss).backward()
            keep(f"quantize {estimator} {dtype}", *q, a.grad, c.grad)
        keep(f"vq_step {dtype}", *ops.vq_step(x, codebook, beta=0.3, backend="cpu"))
        a, c = x.clone().requires_grad_(), levels.requires_grad_()
        r = ops.residual_quantize(a, c, beta=0.3, statistics=True, backend="cpu")
        (r.quantized.sum() + 0.75 * r.commitment_losses.sum() + r.codebook_losses.sum()).backward()
        keep(f"residual {dtype}", *r, a.grad, c.grad)
    x, codebook, *buffers = (
        inputs[f"{name} torch.float32"].clone() for name in ("x", "codes", "codes", "average", "size")
    )
    sums, counts = ops.code_statistics(x, ops.nearest(x, codebook, backend="cpu"), 64, backend="cpu")
    ops.ema_update_(*buffers, sums, counts, decay=0.9, backend="cpu")
    keep("ema", *buffers)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = (inputs[f"{name} {dtype}"].clone().requires_grad_() for name in ("image", "weight", "bias"))
        for op, grad in ((ops.masked_conv2d, "grad"), (ops.gated_masked_conv2d, "grad_gated")):
            out = op(x, weight, bias, backend="cpu")
            keep(f"{op.__name__} {dtype}", out, *torch.autograd.grad(out, (x, weight, bias), inputs[f"{grad} {dtype}"]))
    return found


def _bits(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-19])  # squares, or products, of the latter are denormal in float32
def test_rounding_mode_and_flush_to_zero_change_no_bit(n_threads, scale, threads):
    threads(n_threads)
    inputs = _inputs(scale)
    expected = _results(inputs)
    try:
        for mode in (*DIRECTIONS.get(platform.machine(), ()), "flush"):
            if mode == "flush":
                if not torch.set_flush_denormal(True):
                    continue
            else:
                _set_rounding(mode)
            found = _results(inputs)
            still = _get_rounding()
            _set_rounding(NEAREST)
            assert still == (NEAREST if mode == "flush" else mode), "the caller's mode was not put back"
            different = [name for name, t in expected.items() if _bits(t) != _bits(found[name])]
            assert not different, (mode, different)
    finally:
        _set_rounding(NEAREST)
        torch.set_flush_denormal(False)
