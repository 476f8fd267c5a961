"""Serves a frozen codebook: packs it once, and on a GPU records the lookup as a CUDA graph.

A server looks up few vectors at a time, so the fixed costs of a call count. ``pack_codebook`` lays the codes out once
for the processor's kernels, and a CUDA graph replays the launches of a call without Python between them. Both give the
same indices as the plain call. The script prints whether they do, and microseconds of a call for each way and batch.

    python examples/serve.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastvq.ops import nearest, pack_codebook


def microseconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def as_graph(x: Tensor, codebook: Tensor) -> Callable[[Tensor], Tensor]:
    """The lookup of vectors of x's shape as a CUDA graph. The returned tensor is overwritten by the next call."""
    still = x.clone()  # a graph reads its input from fixed memory
    for _ in range(3):  # compiles and tunes kernels, which a graph cannot record
        nearest(still, codebook)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = nearest(still, codebook)

    def replay(vectors: Tensor) -> Tensor:
        still.copy_(vectors)
        graph.replay()
        return indices

    return replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--short", action="store_true", help="few calls, for a test")
    options = parser.parse_args()
    repeats = 5 if options.short else 200

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    codebook = torch.randn(options.codes, options.dim, device=device)
    packed = pack_codebook(codebook)
    print(packed)
    for batch in (1, 16, 256):
        x = torch.randn(batch, options.dim, device=device)
        expected = nearest(x, codebook)
        ways: dict[str, Callable[[], Tensor]] = {
            "plain": lambda x=x: nearest(x, codebook),
            "packed": lambda x=x: nearest(x, packed),
        }
        if device.type == "cuda":
            replay = as_graph(x, codebook)
            ways["CUDA graph"] = lambda x=x, replay=replay: replay(x)
        same = all(torch.equal(call(), expected) for call in ways.values())
        times = ", ".join(f"{name} {microseconds(call, repeats, device):.0f}" for name, call in ways.items())
        print(f"{batch} vectors: same indices: {same}; microseconds: {times}")


if __name__ == "__main__":
    main()
