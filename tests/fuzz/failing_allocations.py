"""Runs small calls of every op while each of their allocations in turn fails; run by test_failing_allocations.py.

Only allocations inside ``fastvq._cpu`` fail: counting is on while one of its functions runs. Each line of output names
what is about to be tried, so that the last line tells where the process died.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvq import ops
from fastvq.backends import cpu as cpu_backend

LIBRARY = ctypes.CDLL(sys.argv[1])
LIBRARY.failing_start.argtypes = [ctypes.c_long, ctypes.c_int]
LIBRARY.failing_seen.restype = ctypes.c_long
OTHER = {
    "amx_unavailable",
    "available_isas",
    "compiler",
    "set_main_thread",
}  # no op calls these


class Counted:
    """``fastvq._cpu``, with allocations counted while its functions run."""

    def __init__(self, module: Any) -> None:
        self.module, self.called = module, set[str]()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)
        if not callable(function):
            return function

        def counted(*arguments: Any) -> Any:
            self.called.add(name)
            LIBRARY.failing_count(1)
            try:
                return function(*arguments)
            finally:
                LIBRARY.failing_count(0)

        return counted


def calls() -> dict[str, Callable[[], Any]]:
    """A call of each op that is worth three threads; it returns what must not change."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, codebook, levels = normal(1500, 65), normal(130, 65), normal(3, 130, 65)
    indices = ops.nearest(x, codebook)
    image, weight, gated = normal(2, 32, 24, 24), normal(32, 32, 3, 3), normal(64, 32, 3, 3)
    channels, n_codes = 16, 40
    network = [normal(n_codes, channels)]
    for shape in ((2 * channels, channels, 3, 3), (2 * channels, channels, 1, 1), (2 * channels, channels, 1, 3),
                  (channels, channels, 1, 1), (channels, channels, 1, 1), (n_codes, channels, 1, 1)):  # fmt: skip
        network += [normal(*shape), normal(shape[0])]

    def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    def quantize(estimator: str) -> list[Tensor]:
        return gradients(lambda x, c: ops.quantize(x, c, estimator=estimator).quantized, x, codebook)

    def update() -> list[Tensor]:
        buffers = [codebook.clone(), codebook.clone(), torch.ones(130)]
        sums, counts = ops.code_statistics(x, indices, 130)
        ops.ema_update_(*buffers, sums, counts, decay=0.9)
        return buffers

    def draw() -> Tensor:
        ids = torch.zeros(2, 3, 3, dtype=torch.int64)
        state = ops.pixelcnn_start(network, (3,), (2, 3, 3))
        return torch.stack([ops.pixelcnn_step(state, ids, 0, column) for column in range(2)])

    return {
        "nearest": lambda: ops.nearest(x, codebook),
        "nearest, many candidates": lambda: ops.nearest(x, codebook.repeat(3, 1)),
        "nearest, cosine, float64": lambda: ops.nearest(x.double(), codebook.double(), metric="cosine"),
        "pack_codebook": lambda: ops.nearest(x, ops.pack_codebook(codebook)),
        "quantize": lambda: quantize("straight_through"),
        "quantize, rotation": lambda: quantize("rotation"),
        "vq_step": lambda: list(ops.vq_step(x, codebook))[:2],
        "code_statistics, ema_update_": update,
        "residual_quantize": lambda: gradients(lambda x, c: ops.residual_quantize(x, c).quantized, x, levels),
        "residual_quantize, statistics": lambda: list(ops.residual_quantize(x, levels, statistics=True))[:2],
        "masked_conv2d": lambda: gradients(ops.masked_conv2d, image, weight, normal(32) * 0),
        "gated_masked_conv2d": lambda: gradients(ops.gated_masked_conv2d, image, gated, normal(64) * 0),
        "pixelcnn_step": draw,
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(same(u, v) for u, v in zip(a, b, strict=True) if u is not None)


def run(name: str, call: Callable[[], Any], expected: Any, n: int, later: bool) -> tuple[str, int]:
    """What came of the call with allocation ``n`` failing, and the number of allocations."""
    LIBRARY.failing_start(n, later)
    try:
        result = call()
    except MemoryError:
        return "MemoryError", LIBRARY.failing_seen()
    except BaseException as error:
        raise AssertionError(f"{name}: allocation {n} fails: expected MemoryError, got {error!r}") from error
    seen = LIBRARY.failing_seen()
    assert same(result, expected), f"{name}: allocation {n} fails: the call returned another result"
    return "result", seen


def main() -> None:
    counted = Counted(cpu_backend._cpu)
    everything = calls()
    before = {name: call() for name, call in everything.items()}  # with memory that is kept from call to call
    cpu_backend._cpu = counted  # type: ignore[attr-defined]
    outcomes = {"MemoryError": 0, "result": 0}
    for name, call in everything.items():
        for n_threads in (1, 2, 3):  # 3: a thread runs while the next one cannot be made
            torch.set_num_threads(n_threads)
            expected = before[name]
            for later in (False, True):
                _, total = run(name, call, expected, -1, False)
                for n in range(0, total, 3 if later else 1):
                    print(name, "threads", n_threads, "allocation", n, "of", total, "and later" * later, flush=True)
                    outcomes[run(name, call, expected, n, later)[0]] += 1
            LIBRARY.failing_threads(1)
            print(name, "threads", n_threads, "no thread can be started", flush=True)
            assert run(name, call, expected, -1, False)[0] == "result", name
            LIBRARY.failing_threads(0)
    missed = {name for name in dir(counted.module) if not name.startswith("_")} - counted.called - OTHER
    print(f"{outcomes['MemoryError']} calls raised MemoryError, {outcomes['result']} returned the right result")
    print(f"functions that no call reaches: {sorted(missed)}")


if __name__ == "__main__":
    main()
