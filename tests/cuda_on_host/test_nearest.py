"""The CUDA lookup, its source compiled for the processor: the index contract, in this process and under sanitizers."""

import numpy as np
import pytest
import torch

from fastvq.backends import views
from fastvq.ops import nearest
from tests.cuda_on_host import host
from tests.support import oracle
from tests.support.cases import DTYPES, HARD, METRICS, gaussian, generator

ROWS, CODES = 32, 5000  # of each hard case: a GPU's threads take turns on one processor here
SANITIZED_ROWS, SANITIZED_CODES = 5, 300


def check(x, codebook, metric):
    got = nearest(x, codebook, metric=metric, backend="cuda")
    wrong = (got != oracle.nearest(x, codebook, metric)).nonzero()
    assert not len(wrong), f"{len(wrong)} of {got.numel()} rows differ, the first at {wrong[0].tolist()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(case, dtype, cuda_on_host):
    x, codebook = (t.to(dtype) for t in HARD[case](generator(0)))
    for metric in METRICS:
        check(x[:ROWS], codebook[:CODES], metric)


SIZES = ((1, 1, 1), (2, 3, 7), (7, 17, 31), (17, 64, 3), (65, 31, 64), (33, 65, 17), (127, 127, 2), (3, 1000, 65))
WIDE = ((40, 70, 600), (33, 150, 1100), (17, 70, 2100), (3, 65, 4096), (3, 5, 4097))  # a block's shape for each


@pytest.mark.parametrize(("n", "k", "d"), SIZES + WIDE)
def test_sizes(n, k, d, cuda_on_host):
    x, codebook = gaussian(n, k, d, generator(n * k + d))
    for metric in METRICS:
        check(x, codebook, metric)
    check(x.bfloat16(), codebook.double(), "euclidean")
    check(x.half(), codebook.bfloat16(), "euclidean")


def test_layouts(cuda_on_host):
    g = generator(4)
    images, codebook = torch.randn(3, 17, 5, 7, generator=g), torch.randn(65, 17, generator=g)
    for x in (
        images.movedim(1, -1),
        images.movedim(1, -1)[:, ::2, 1::3],  # three strides
        images[0, :, 0, 0].expand(2, 9, 17),  # zero strides
        torch.randn(9, 34, generator=g)[:, ::2],
        torch.randn(17, generator=g),
        torch.randn(3, 0, 17, generator=g),
    ):
        check(x, codebook, "euclidean")
        check(x, codebook.t().contiguous().t(), "cosine")
    heads = torch.randn(3, 65, 17, generator=g)
    x = torch.randn(31, 51, generator=g).view(31, 3, 17).movedim(1, 0)  # heads that lie inside the vectors
    for metric in METRICS:
        got = nearest(x, heads, metric=metric, backend="cuda")
        assert all(torch.equal(got[h], oracle.nearest(x[h], heads[h], metric)) for h in range(3))


def add_call(calls, x, codebook, metric, mask=None, launcher="nearest"):
    """The lookup of x [N, D]; its workspace holds NaN."""
    _, rows = views.rows_view(x, None)
    codes = views.codes_view(codebook)
    workspace = np.full(host.module().nearest_workspace(rows, codes), 0xFF, np.uint8)
    indices = np.full(x.shape[0], -9, np.int64)
    buffers = [host.as_bytes(x), host.as_bytes(codebook), indices, workspace]
    if mask is not None:
        buffers.append(host.as_bytes(mask))
    calls.add(
        launcher,
        buffers,
        [host.Buffer(0), *rows[1:], host.Buffer(1), *codes[1:], views.metric_code(metric), 0,
         host.NOTHING if mask is None else host.Buffer(4), host.Buffer(2), host.Buffer(3)],
    )  # fmt: skip


@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_under_sanitizers(kind, tmp_path):
    calls, expected = host.Calls(), []
    # A race does not depend on what the numbers are: ThreadSanitizer gets every other case, and every block's shape.
    step = 1 if kind == "address" else 2
    for i, case in enumerate([*HARD][::step]):
        x, codebook = HARD[case](generator(0))
        rows, codes = x[:SANITIZED_ROWS].contiguous(), codebook[:SANITIZED_CODES].contiguous()
        add_call(calls, rows, codes, METRICS[i % 3])
        expected.append(oracle.nearest(rows, codes, METRICS[i % 3]))
    for i, (n, k, d) in enumerate(SIZES[::step] + WIDE):
        x, codebook = gaussian(n, k, d, generator(i))
        if (n, k, d) in SIZES:
            x, codebook = x.to(DTYPES[i % 4]), codebook.to(DTYPES[i // 2 % 4])
        mask = torch.rand(n, generator=generator(i)) < 0.7
        add_call(calls, x, codebook, METRICS[i % 3], mask)
        expected.append(torch.where(mask, oracle.nearest(x, codebook, METRICS[i % 3]), -1))
    for i, (buffers, right) in enumerate(zip(calls.run(kind, tmp_path), expected, strict=True)):
        assert np.array_equal(np.frombuffer(buffers[2], np.int64), right.numpy()), f"call {i}"


def test_what_the_filter_leaves_to_the_full_scan(tmp_path):
    """Exact indices alone would not show a bound that is empty: these rows must be settled without the scan."""
    g = generator(1)
    x, codebook = gaussian(48, 200, 48, g)
    huge = codebook.clone()
    huge[100] *= 1e25
    cases = [
        (x, codebook, "euclidean"), (x, codebook, "dot"), (x, codebook, "cosine"),
        (x.bfloat16(), codebook.half(), "dot"),
        (x + 1000, codebook + 1000, "euclidean"), (x, huge, "euclidean"), (x * 1e-30, codebook * 1e-30, "euclidean"),
        (x, torch.cat([codebook, codebook]), "euclidean"),
        (x, codebook[:1].expand(100, 48).contiguous(), "euclidean"),
    ]  # fmt: skip
    calls = host.Calls()
    for case in cases:
        add_call(calls, *case, launcher="filter")
    *settled, many_ties = (np.frombuffer(b[2], np.int64) for b in calls.run("address", tmp_path))
    for (rows, codes, metric), got in zip(cases, settled, strict=False):
        assert np.array_equal(got, oracle.nearest(rows, codes, metric).numpy()), metric
    assert (many_ties == -2).all()
