"""Threads and processes: forked workers, the GIL, and scratch memory that does not grow with N."""

import multiprocessing
import resource
import threading
import time

import pytest
import torch

from fastvq.ops import nearest, quantize
from tests.support import oracle
from tests.support.cases import gaussian, generator


class Tokens(torch.utils.data.Dataset):
    """Looks its items up in the worker."""

    def __init__(self, x, codebook):
        self.x, self.codebook = x, codebook

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return nearest(self.x[i], self.codebook)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_forked_dataloader_workers_after_the_parent_used_threads(threads):
    threads(2)
    x, codebook = gaussian(8 * 3000, 257, 33, generator(0))
    expected = oracle.nearest(x, codebook)
    assert torch.equal(nearest(x, codebook), expected)
    loader = torch.utils.data.DataLoader(
        Tokens(x.view(8, 3000, 33), codebook), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert torch.equal(torch.cat(list(loader)).view(-1), expected)


def test_the_gil_is_released(threads):
    threads(1)
    x, codebook = gaussian(20000, 1024, 64, generator(1))
    seen, running = [], threading.Event()

    def run_lookup():
        running.set()
        nearest(x, codebook, backend="cpu")
        running.clear()

    worker = threading.Thread(target=run_lookup)
    worker.start()
    running.wait()
    while running.is_set():  # with the GIL held this loop would not turn while the kernel runs
        seen.append(time.perf_counter())
    worker.join()
    assert len(seen) > 100


def test_calls_from_several_python_threads():
    x, codebook = gaussian(5000, 257, 33, generator(2))
    expected = oracle.nearest(x, codebook)
    results = [None] * 4

    def run_lookup(i):
        results[i] = quantize(x, codebook).indices

    workers = [threading.Thread(target=run_lookup, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(r, expected) for r in results)


def _growth_of_one_call(queue, n, k, d):
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    indices = torch.ops.fastvq.nearest(x[:1], codebook[:2], "euclidean", "exact", False, "cpu")
    torch.zeros(n, dtype=torch.int64)  # the result's own memory has been touched before the mark is taken
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    indices = torch.ops.fastvq.nearest(x, codebook, "euclidean", "exact", False, "cpu")
    queue.put(((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - indices.numel() * 8, None))


@pytest.mark.parametrize("n", [1000, 400_000])
def test_scratch_is_at_most_twice_the_codebook_and_eight_mib(n):
    k, d = 2048, 64
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_growth_of_one_call, args=(queue, n, k, d))
    process.start()
    growth, _ = queue.get(timeout=120)
    process.join()
    assert growth <= 2 * k * d * 4 + 8 * 2**20
