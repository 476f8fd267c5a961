"""A PixelCNN trained for two minutes on id maps of photographs, against tables; and what it samples.

    python benchmarks/bench_prior.py

Photographs become maps of the nearest of 128 codes (k-means on patches of 4 x 4 pixels). Vertical strips of every map
are held out; on crops of them the bits an id are compared: the PixelCNN's, those of the ids' frequencies at each
position of a crop, and those of a Markov table over (above, left), both tables smoothed as suits the held-out crops
best. Writes prior.csv and prior.png (samples, real crops, bits) to ./out (--out DIR).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import fastvq
from fastvq.models import PixelCNN
from fastvq.ops import nearest
from harness import Row, photographs, write_csv
from harness.machine import describe_machine
from harness.report import print_cells

SIDE = 4  # pixels of a patch
CROP = 16  # ids of a crop
STRIP = 32  # columns of a strip; every fourth is held out
N_CODES = 128


def id_maps() -> tuple[list[Tensor], Tensor]:
    """An id map [h, w] for every photograph, and the codes [K, SIDE * SIDE * 3]."""
    pictures = photographs.load()
    patches = [torch.from_numpy(photographs.cut(p.pixels, SIDE)) for p in pictures]
    fitted = fastvq.kmeans(torch.cat(patches), N_CODES, generator=torch.Generator().manual_seed(0))
    shapes = [(p.pixels.shape[0] // SIDE, p.pixels.shape[1] // SIDE) for p in pictures]
    return [nearest(x, fitted.codebook).view(s) for x, s in zip(patches, shapes, strict=True)], fitted.codebook


def strips(maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Pieces to train on and pieces held out, cut from every map by columns; none narrower than a crop."""
    train, held_out = [], []
    for ids in maps:
        for x in range(0, ids.shape[1], 4 * STRIP):
            train.append(ids[:, x : x + 3 * STRIP])
            held_out.append(ids[:, x + 3 * STRIP : x + 4 * STRIP])
    return [t for t in train if t.shape[1] >= CROP], [t for t in held_out if t.shape[1] >= CROP]


def all_crops(pieces: Sequence[Tensor], stride: int) -> Tensor:  # [n, CROP, CROP]
    return torch.cat([p.unfold(0, CROP, stride).unfold(1, CROP, stride).reshape(-1, CROP, CROP) for p in pieces])


def batches(crops: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield crops[torch.randint(len(crops), (size,), generator=generator)]


def train(model: PixelCNN, crops: Tensor, seconds: float, batch: int) -> int:
    """AdamW, the learning rate falling with the time left; returns the steps done."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    start, steps = time.monotonic(), 0
    for ids in batches(crops, batch, torch.Generator().manual_seed(1)):
        gone = (time.monotonic() - start) / seconds
        if gone >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (steps + 1) / 20) * 0.5 * (1 + math.cos(math.pi * gone))
        optimizer.zero_grad()
        model.loss(ids).nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def model_bits(model: PixelCNN, crops: Tensor) -> float:
    return sum(model.loss(c).bits.item() * len(c) for c in crops.split(32)) / len(crops)


def bits_of(probability: Tensor) -> float:
    return -probability.log2().mean().item()


STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


def frequency_bits(train_crops: Tensor, test_crops: Tensor) -> float:
    """p(id | position): counts at the position, smoothed by the frequencies over all positions."""
    overall = torch.bincount(train_crops.flatten(), minlength=N_CODES).double() + 1
    overall /= overall.sum()
    counts = torch.zeros(CROP * CROP, N_CODES, dtype=torch.float64)
    position = torch.arange(CROP * CROP).expand(len(train_crops), -1)
    counts.index_put_((position, train_crops.flatten(1)), torch.ones((), dtype=torch.float64), accumulate=True)
    position, ids = torch.arange(CROP * CROP).expand(len(test_crops), -1), test_crops.flatten(1)
    n = counts.sum(1)[position]
    return min(bits_of((counts[position, ids] + s * overall[ids]) / (n + s)) for s in STRENGTHS)


def neighbours(crops: Tensor) -> tuple[Tensor, Tensor]:
    """Ids above and to the left, N_CODES at the border."""
    padded = torch.nn.functional.pad(crops, (1, 0, 1, 0), value=N_CODES)
    return padded[:, :-1, 1:].flatten(), padded[:, 1:, :-1].flatten()


def markov_bits(train_crops: Tensor, test_crops: Tensor) -> float:
    """p(id | above, left): counts, smoothed by those given left alone, smoothed by the overall frequencies."""
    above, left = neighbours(train_crops)
    ids, k = train_crops.flatten(), N_CODES + 1
    overall = torch.bincount(ids, minlength=N_CODES).double() + 1
    overall /= overall.sum()
    of_left = torch.bincount(left * N_CODES + ids, minlength=k * N_CODES).view(k, N_CODES).double()
    of_both = (
        torch.bincount((above * k + left) * N_CODES + ids, minlength=k * k * N_CODES).view(k * k, N_CODES).double()
    )
    above, left, ids = *neighbours(test_crops), test_crops.flatten()
    both, n_left = above * k + left, of_left.sum(1)[left]
    n_both = of_both.sum(1)[both]
    best = math.inf
    for s in STRENGTHS:
        given_left = (of_left[left, ids] + s * overall[ids]) / (n_left + s)
        for t in STRENGTHS:
            best = min(best, bits_of((of_both[both, ids] + t * given_left) / (n_both + t)))
    return best


def picture(ids: Tensor, codebook: Tensor) -> Tensor:  # [CROP * SIDE, CROP * SIDE, 3]
    shape = (CROP * SIDE, CROP * SIDE, 3)
    return torch.from_numpy(photographs.join(codebook[ids.flatten()].numpy(), shape, SIDE)).clamp(0, 1)


def draw(path: Path, samples: Tensor, real: Tensor, codebook: Tensor, bits: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    n = len(samples)
    figure = plt.figure(figsize=(1.5 * n + 5, 3.4))
    pictures, chart = figure.subfigures(1, 2, width_ratios=(1.5 * n, 5))
    for axes, ids in zip(pictures.subplots(2, n).flat, [*samples, *real], strict=True):
        axes.imshow(picture(ids, codebook))
        axes.set(xticks=[], yticks=[])
    pictures.suptitle("above: samples; below: held-out crops")
    axes = chart.subplots()
    axes.barh(
        [name.replace(" ", "\n", 1) for name in bits], list(bits.values()), color=["#d1495b", "#2e4057", "#7f7f7f"]
    )
    axes.set(xlabel="bits an id, held out")
    axes.invert_yaxis()
    chart.subplots_adjust(left=0.3, bottom=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a PixelCNN trained on id maps of photographs, against tables")
    parser.add_argument("--seconds", type=float, default=120.0, help="training time; default: 120")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: ./out")
    options = parser.parse_args(arguments)
    if reason := photographs.unavailable():
        print(reason, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    maps, codebook = id_maps()
    train_pieces, held_out = strips(maps)
    train_crops, test_crops = all_crops(train_pieces, 1), all_crops(held_out, CROP)
    print(f"{describe_machine()}\n{sum(m.numel() for m in maps)} ids of {len(maps)} photographs, {N_CODES} codes; "
          f"{len(train_crops)} crops to train on, {len(test_crops)} held out", flush=True)  # fmt: skip

    torch.manual_seed(0)
    model = PixelCNN(N_CODES, options.channels, options.layers)
    steps = train(model, train_crops, options.seconds, options.batch)
    bits = {
        "PixelCNN": model_bits(model.eval(), test_crops),
        "Markov (above, left)": markov_bits(train_crops, test_crops),
        "frequency at position": frequency_bits(train_crops, test_crops),
    }
    cells = [[name, f"{b:.3f}", f"{1 - bits['PixelCNN'] / b:.1%}"] for name, b in bits.items()]
    print_cells(f"Bits an id after {steps} steps", ["", "bits", "PixelCNN needs fewer by"], cells)
    shape, where = f"{len(test_crops)}x{CROP}x{CROP}", "photographs, held-out strips"
    rows = [
        Row(f"bits an id, {N_CODES} codes", shape, where, torch.get_num_threads(), name, note=f"{b:.4f} bits")
        for name, b in bits.items()
    ]
    write_csv(options.out / "prior.csv", rows)
    samples = model.sample((8, CROP, CROP), generator=torch.Generator().manual_seed(2))
    real = test_crops[torch.randperm(len(test_crops), generator=torch.Generator().manual_seed(3))[:8]]
    draw(options.out / "prior.png", samples, real, codebook, bits)
    print(f"Wrote {options.out / 'prior.csv'}, {options.out / 'prior.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
