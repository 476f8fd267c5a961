"""Ctrl-C and other signals during a long call of the CPU kernels."""

import os
import signal
import threading
import time
from functools import partial

import pytest
import torch

from fastvq import kmeans, ops
from fastvq.backends import cpu as cpu_backend
from fastvq.models import PixelCNN

pytestmark = [
    pytest.mark.skipif(cpu_backend.unavailable() is not None, reason="needs the CPU kernels"),
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer that sends a signal"),
]


class Stopped(Exception):
    pass


def _vectors(n: int, dim: int) -> torch.Tensor:
    return torch.randn(64, dim).repeat(n // 64, 1)


def _conv() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 128, 64, 64).repeat(12, 1, 1, 1), torch.randn(256, 128, 9, 9)


def _statistics():
    x = torch.randn(1, 256).expand(4_000_000, 256)
    return partial(ops.code_statistics, x, torch.zeros(4_000_000, dtype=torch.int64), 8, backend="cpu")


def _backward():
    grad = torch.randn(12, 256, 64, 64)
    return partial(torch.ops.fastvq.masked_conv2d_backward, grad, *_conv(), "B", None, 1, True, True, True, "cpu")


def _near_copies():
    codes = torch.randn(1, 8).repeat(3_000_000, 1).add_(torch.rand(3_000_000, 1))
    return partial(ops.nearest, torch.randn(200, 8), codes, backend="cpu")


def _by_the_definition():
    # Rows beyond the filter's range, too wide for the pass in double.
    return partial(ops.nearest, torch.randn(96, 4096) * 1e20, torch.randn(1, 4096).expand(12_000, -1), backend="cpu")


def _residual():
    return partial(
        ops.residual_quantize, _vectors(64_000, 64), torch.randn(4, 8192, 64), statistics=True, backend="cpu"
    )


def _lookup(op):
    return partial(op, _vectors(128_000, 64), torch.randn(16384, 64), backend="cpu")


def _kmeans(init):
    return partial(kmeans, _vectors(64_000, 64), 2048, init=init, n_iter=50, tolerance=0.0)


def _step():
    """(state, ids) of a sampler whose first position of a row takes a third of a second of one core, and more."""
    batch = 128
    model = PixelCNN(64, 128, 3, kernel_size=9)
    state = model.sampler_state((batch, 3, 64), None, None)
    assert state.backend == "cpu"
    return state, torch.randint(0, 64, (batch, 3, 64))


def _start(c=1152, k=5):
    out = [2 * c, c]  # of two layers
    layers = [[(2 * c, c, k, k), (2 * c,), (2 * c, c, 1, 1), (2 * c,), (2 * c, c, 1, k), (2 * c,), (n, c, 1, 1), (n,)]
              for n in out]  # fmt: skip
    shapes = [(16, c), *layers[0], *layers[1], (c, c, 1, 1), (c,), (16, c, 1, 1), (16,)]
    return partial(ops.pixelcnn_start, [torch.zeros(s) for s in shapes], (k, k), (1, 4, 4), backend="cpu")


def _sample(cached):
    return partial(PixelCNN(256, 64, 6).sample, (4, 48, 48), cached=cached)


# Calls of some seconds on one core, which the test leaves after a fraction of one.
CALLS = {
    "nearest": lambda: _lookup(ops.nearest),
    "one block of rows": _near_copies,
    "by the definition": _by_the_definition,
    "quantize": lambda: _lookup(ops.quantize),
    "vq_step": lambda: _lookup(ops.vq_step),
    "residual_quantize": _residual,
    "code_statistics": _statistics,
    "masked_conv2d": lambda: partial(ops.masked_conv2d, *_conv(), backend="cpu"),
    "masked_conv2d_backward": _backward,
    "gated_masked_conv2d": lambda: partial(ops.gated_masked_conv2d, *_conv(), backend="cpu"),
    "kmeans, the start": lambda: _kmeans("k-means++"),
    "kmeans, the iterations": lambda: _kmeans("random"),
    "pixelcnn_start": _start,
    "pixelcnn_step": lambda: partial(ops.pixelcnn_step, *_step(), 0, 0),
    "PixelCNN.sample": lambda: _sample(cached=True),
    "PixelCNN.sample without a cache": lambda: _sample(cached=False),
}


@pytest.fixture
def alarm():
    """alarm(seconds, handler) runs the handler on SIGALRM after so many seconds."""
    before = signal.getsignal(signal.SIGALRM)

    def start(seconds, handler, interval=0.0):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)

    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _seconds_to_leave(call, alarm, after: float) -> float:
    """From the signal to the exception."""

    def stop(*_):
        raise Stopped

    start = time.perf_counter()
    alarm(after, stop)
    with pytest.raises(Stopped):
        call()
        time.sleep(after)  # the call was shorter: the signal comes here, and the time below says so
    return time.perf_counter() - start - after


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_signal_leaves_a_long_call_within_a_fifth_of_a_second(name, n_threads, threads, alarm):
    threads(n_threads)
    call = CALLS[name]()
    times = []
    for _ in range(4):  # a busy machine may delay one
        times.append(_seconds_to_leave(call, alarm, after=0.1))
        if times[-1] < 0.2:
            break
    assert min(times) < 0.2, times
    # The process goes on as if nothing had been.
    x, codebook = torch.randn(5000, 16), torch.randn(64, 16)
    assert torch.equal(ops.nearest(x, codebook, backend="cpu"), ops.nearest(x, codebook, backend="reference"))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_position_that_was_left_can_be_computed_again(n_threads, threads, alarm):
    threads(n_threads)
    state, ids = _step()

    def positions(between):
        logits = []
        for row in range(2):
            between(row)
            logits += [ops.pixelcnn_step(state, ids, row, column) for column in range(2)]
        return torch.stack(logits)

    def leave(row):
        _seconds_to_leave(partial(ops.pixelcnn_step, state, ids, row, 0), alarm, after=0.02)  # of 0.2 s and more

    expected = positions(lambda row: None)
    assert torch.equal(positions(leave), expected)

    def refuse(row):
        wrong = ids.clone()
        wrong[-1, row - 1, 5] = 99
        if row > 0:
            with pytest.raises(ValueError, match="got 99"):
                ops.pixelcnn_step(state, wrong, row, 0)

    assert torch.equal(positions(refuse), expected)


def test_control_c_leaves_a_backward():
    x, weight = torch.randn(6, 128, 64, 64, requires_grad=True), torch.randn(64, 128, 9, 9, requires_grad=True)
    out = ops.masked_conv2d(x, weight, backend="cpu")
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        out.sum().backward()
        time.sleep(5)
    assert time.perf_counter() - start < 5
    assert ops.masked_conv2d(x[:1, :, :8], weight, backend="cpu").isfinite().all()


def test_a_handler_may_run_kernels_of_its_own(alarm):
    # Small enough that both calls would use the memory that a thread keeps from lookup to lookup.
    x, codebook = _vectors(640_000, 32), torch.randn(2048, 32)
    expected = ops.nearest(x[:64], codebook, backend="cpu").repeat(10_000)
    others, ran = torch.randn(700, 32), []

    def handler(*_):
        ran.append(ops.quantize(torch.randn(300, 32), others, backend="cpu"))

    alarm(0.06, handler, interval=0.06)
    found = ops.nearest(x, codebook, backend="cpu")
    during = len(ran)
    alarm(0, signal.SIG_IGN)
    assert torch.equal(found, expected)
    assert during > 0


def test_threads_that_python_does_not_interrupt_take_no_notice(alarm):
    x, codebook = _vectors(64_000, 64), torch.randn(4096, 64)
    results, ran = [], []
    alarm(0.05, lambda *_: ran.append(1), interval=0.05)
    worker = threading.Thread(target=lambda: results.append(ops.nearest(x, codebook, backend="cpu")))
    worker.start()
    worker.join()
    assert torch.equal(results[0], ops.nearest(x, codebook, backend="cpu"))
