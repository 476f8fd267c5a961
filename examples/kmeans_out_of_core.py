"""Fits a codebook to vectors in a file that is never loaded whole.

``fastvq.kmeans`` takes a function that returns an iterator over batches, and calls it once for each pass. Here the
batches are slices of a memory-mapped NumPy file, so one batch is in memory at a time. The script makes such a file,
fits the codebook and prints the size of the file, the growth of the process's memory while it fits, the number of
iterations, and the mean squared distance of a vector to its code.

    python examples/kmeans_out_of_core.py
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastvq

WIDTH, BATCH = 32, 16384


def write_vectors(path: Path, n: int) -> None:
    """A .npy file of n vectors around 200 centres, written batch by batch."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, WIDTH)).astype(np.float32)
    file = np.lib.format.open_memmap(path, "w+", np.float32, (n, WIDTH))
    for start in range(0, n, BATCH):
        part = file[start : start + BATCH]
        noise = rng.normal(size=part.shape).astype(np.float32)
        part[:] = centres[rng.integers(len(centres), size=len(part))] + 0.1 * noise
    file.flush()


def memory_in_use() -> float:
    """Memory of this process in MiB, without the pages of files that the system keeps mapped."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")  # only Linux has this file
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--short", action="store_true", help="a small file, for a test")
    options = parser.parse_args()
    n = 20_000 if options.short else 4_000_000

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        write_vectors(path, n)
        print(f"file: {path.stat().st_size / 2**20:.0f} MiB, {n} vectors of width {WIDTH}")
        used = [memory_in_use()]

        def batches() -> Iterator[Tensor]:
            file = np.load(path, mmap_mode="r")
            for start in range(0, n, BATCH):
                yield torch.from_numpy(np.array(file[start : start + BATCH]))  # a copy: the map is read-only
                used.append(memory_in_use())

        result = fastvq.kmeans(batches, options.codes, n_iter=10, generator=torch.Generator().manual_seed(0))
        print(f"codebook {list(result.codebook.shape)} after {result.n_iter} iterations")
        print(f"memory grew by at most {max(used) - used[0]:.0f} MiB")
        print(f"mean squared distance {result.inertia / n:.4f}; noise of the data {0.01 * WIDTH:.4f}")
        print(f"vectors of the smallest and largest code: {int(result.counts.min())}, {int(result.counts.max())}")


if __name__ == "__main__":
    main()
