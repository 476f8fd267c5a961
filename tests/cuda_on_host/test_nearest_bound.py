"""The CUDA filter's bound: no score is further from the truth, it is not empty, and it leaves few codes to resolve."""

import numpy as np
import pytest
import torch

from fastvq.backends import views
from tests.cuda_on_host import host
from tests.fuzz import tensor_cores
from tests.support.cases import METRICS, gaussian, generator
from tests.support.distributions import DISTRIBUTIONS

ROWS, CODES = 16, 65
WIDTHS = (3, 4, 5, 8, 9, 64)  # up to 4 and up to 8: operands in two parts


def add_call(calls, x, codebook, metric):
    rows, codes = views.rows_view(x, None)[1], views.codes_view(codebook)
    workspace = np.full(host.module().nearest_workspace(rows, codes), 0xFF, np.uint8)
    scores = np.full((2, x.shape[0], codebook.shape[0]), np.nan, np.float32)
    calls.add(
        "filter_scores",
        [host.as_bytes(x), host.as_bytes(codebook), scores[0], scores[1], np.zeros(1, np.int32),
         np.zeros(x.shape[1], np.float32), workspace],
        [host.Buffer(1), *codes[1:], host.Buffer(0), *rows[1:], views.metric_code(metric),
         *map(host.Buffer, (2, 3, 4, 5, 6))],
    )  # fmt: skip


def run(cases, folder):
    """Of each case scores and bounds [N, K], and the truth that the scores stand for."""
    calls = host.Calls()
    for case in cases:
        add_call(calls, *case)
    for (x, codebook, metric), buffers in zip(cases, calls.run("address", folder), strict=True):
        scores, bounds = (np.frombuffer(b, np.float32).reshape(len(x), -1).astype(np.float64) for b in buffers[2:4])
        lift, mean = int(np.frombuffer(buffers[4], np.int32)[0]), np.frombuffer(buffers[5], np.float32)
        yield scores, bounds, truth(x.double().numpy(), codebook.double().numpy(), metric, lift, mean)


def truth(x, codes, metric, lift, mean):
    """t_k of csrc/cuda/filter.cuh, in units of its scores."""
    with np.errstate(all="ignore"):
        if metric == "cosine":
            codes = codes / np.sqrt((codes * codes).sum(1, keepdims=True))
        codes = (codes - mean.astype(np.float64)) * 2.0**lift
        if metric == "euclidean":
            x = (x - mean.astype(np.float64)) * 2.0**lift
            return x @ codes.T - 0.5 * (codes * codes).sum(1)
        # Of such a row nothing matters but which score is largest: it is lifted to 2^14.
        up = 14 - np.maximum(np.frexp(np.abs(x).max(1, keepdims=True))[1] - 1, -130)
        return (x * 2.0**up) @ codes.T


def test_no_score_is_further_from_the_truth(tmp_path):
    widths = {name: (8,) for name in DISTRIBUTIONS} | {"gaussian": WIDTHS}
    drawn = [(*DISTRIBUTIONS[name](generator(d), ROWS, CODES, d), d) for name in DISTRIBUTIONS for d in widths[name]]
    cases = [(x, codebook, METRICS[i % 3]) for i, (x, codebook, _) in enumerate(drawn)]
    largest = dict.fromkeys(WIDTHS, 0.0)
    for (*_, d), (scores, bounds, exact) in zip(drawn, run(cases, tmp_path), strict=True):
        there = ~np.isnan(scores)
        used = (np.abs(scores - exact)[there] / bounds[there]).max(initial=0)
        assert used <= 1
        largest[d] = max(used, largest[d])
    assert all(used >= 0.05 for used in largest.values()), largest


def test_operands_in_two_parts_leave_less_to_resolve(tmp_path):
    """Rows of 8 dims, and the same with a ninth of zeros, which are filtered in one part."""
    x, codebook = gaussian(64, 512, 8, generator(3))
    wider = [torch.cat([t, torch.zeros(len(t), 1)], 1) for t in (x, codebook)]
    several = []
    for scores, bounds, _ in run([(x, codebook, "euclidean"), (*wider, "euclidean")], tmp_path):
        winners = (scores + bounds >= (scores - bounds).max(1, keepdims=True)).sum(1)
        several.append(int((winners > 1).sum()))
    assert several[0] <= 1 and several[0] < several[1]


@pytest.mark.skipif(tensor_cores.missing() is not None, reason=str(tensor_cores.missing()))
@pytest.mark.parametrize("width", [8, 16])  # operands in two parts, in one
def test_bound_holds_for_subnormal_operands(tmp_path, width):
    """Tensor cores align the product of a subnormal half as if that half were 2^-14."""
    x = torch.full((1, width), 0.40625)
    x[:, 0] = 2.0**14
    codebook = torch.full((65, width), -(2.0**12))  # sets the scale: to 1
    codebook[1:] = 2.0**-24
    scores, bounds, exact = next(iter(run([(x, codebook, "dot")], tmp_path)))
    assert np.array_equal(exact, (x.double() @ codebook.double().T).numpy()), "the operands are the inputs"
    assert np.isfinite(scores).all()
    a, b = x.half().expand(65, width), codebook.half()
    for instruction in tensor_cores.load("mma.sync fp16"):
        score = instruction.evaluate(a, b, torch.zeros(65)).double().numpy()
        assert (np.abs(score - exact[0]) <= bounds[0]).all(), instruction.generation
