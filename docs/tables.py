"""The tables of README and docs that come from benchmarks/results, and from the declarations of the ops.

``python docs/tables.py`` writes them into the pages, below the header that a page has; tests/test_figures.py fails
where a page and its file differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from fastvq.ops._op import OPS, ORDER
from results import H100, Result, best, fastest_two, mib, ms, one, percent, rows, times

__all__ = ["TABLES", "written"]

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("65536x1024x64", "65536x1024x256", "16384x8192x256", "65536x16384x8")
GAUSSIAN = {"data": "gaussian", "threads": "1"}
LARGE = "1048576x8192x256"
CROSS = "\N{MULTIPLICATION SIGN}"
NOT_A_PEER = "read"  # one read of the rows: a limit


def spaced(shape: str, cross: str = "x") -> str:
    return shape.replace("x", f" {cross} ")


def patched(row: Result) -> tuple[Result, Result]:
    return row, one("drop_in.csv", case=row["case"], provider="after")


def readme_patched() -> Iterable[tuple[str, ...]]:
    shown = {
        "vq-pytorch VectorQuantize, train": "vector-quantize-pytorch `VectorQuantize`, training",
        "vq-pytorch ResidualVQ, train": "vector-quantize-pytorch `ResidualVQ`, training",
        "transformers Encodec, encode": "transformers Encodec, encode",
        "diffusers VectorQuantizer, encode": "diffusers `VectorQuantizer`, encode",
    }
    for case, name in shown.items():
        before, after = patched(one("drop_in.csv", case=case, provider="before"))
        yield name, spaced(before["shape"], CROSS), f"{ms(before)} → {ms(after)}", times(before)


def all_patched() -> Iterable[tuple[str, ...]]:
    for row in rows("drop_in.csv"):
        if row["provider"] == "before":
            before, after = patched(row)
            spare = " -> ".join(mib(r) for r in (before, after))
            other = f"{before['differing']}/{before['compared']}"
            yield before["case"], before["shape"], f"{ms(before)} -> {ms(after)}", times(before), spare, other


def readme_speed() -> Iterable[tuple[str, ...]]:
    shape = SHAPES[0]
    ours, faiss, cdist = (
        one("quantize.csv", shape=shape, provider=name, **GAUSSIAN) for name in ("fastvq avx512_vnni", "faiss", "cdist")
    )
    against = f"faiss {ms(faiss)} ms; `cdist` + argmin {ms(cdist)} ms"
    yield f"lookup, {spaced(shape, CROSS)} (CPU)", f"{ms(ours)} ms", against, f"{times(faiss)}; {times(cdist)}"
    ours, torch, peer = training_step(shape)
    against = f"tuned torch {ms(torch)} ms; vector-quantize-pytorch {ms(peer)} ms"
    name = f"training step, {spaced(shape, CROSS)} (CPU)"
    yield name, f"{ms(ours)} ms", against, f"{times(torch)}; {times(peer)}"
    ours, other = fastest_two("masked_conv.csv", "16x128->256 32x32 5x5", "forward+backward")
    name = f"masked convolution 128 → 256, 5 {CROSS} 5, forward and backward (CPU)"
    yield name, f"{ms(ours)} ms", f"the best of torch's six ways, {ms(other)} ms", times(other)
    for shape in (LARGE, "65536x512x64"):
        ours = one(f"{H100}lookup.csv", shape=shape, data="float32", provider="fastvq triton")
        other = best(f"{H100}lookup.csv", shape=shape, data="float32")
        against = f"{other['provider']}, inexact, {ms(other)} ms"
        yield f"lookup, {spaced(shape, CROSS)}, float32 (H100)", f"{ms(ours)} ms", against, times(other)


def training_step(shape: str) -> tuple[Result, Result, Result]:
    where = {"shape": shape, "threads": "1"}
    ours, peer = (one("train_step.csv", provider=name, **where) for name in ("fastvq", "vq-pytorch"))
    return ours, best("train_step.csv", "vq-pytorch", **where), peer


def lookup_columns(file: str, shape: str, first: str, second: str) -> tuple[str, ...]:
    ours, without, faiss, cdist = (
        one(file, shape=shape, provider=name, **GAUSSIAN) for name in (first, second, "faiss", "cdist")
    )
    return spaced(shape), ms(ours), percent(ours), ms(without), ms(faiss), ms(cdist)


def lookups() -> Iterable[tuple[str, ...]]:
    return (lookup_columns("quantize.csv", shape, "fastvq avx512_vnni", "fastvq avx512") for shape in SHAPES)


def lookups_amx() -> Iterable[tuple[str, ...]]:
    shapes = ("65536x512x64", *SHAPES[:3])
    return (lookup_columns("quantize_amx.csv", shape, "fastvq amx", "fastvq avx512_vnni") for shape in shapes)


def training() -> Iterable[tuple[str, ...]]:
    where = {"shape": "1048576x1024x64", "threads": "1"}
    ours, read = (one("ema.csv", provider=name, **where) for name in ("fastvq", NOT_A_PEER))
    other = best("ema.csv", NOT_A_PEER, **where)
    against = f"`{other['provider']}` {ms(other)} ms; one read of x {ms(read)} ms"
    yield "`code_statistics`, 1048576 x 1024 x 64", f"{ms(ours)} ms", against, times(other)
    ours, torch, peer = training_step(SHAPES[0])
    against = f"vector-quantize-pytorch {ms(peer)} ms, {mib(peer)} MiB; tuned torch {ms(torch)} ms"
    mine = f"{ms(ours)} ms, {mib(ours)} MiB"
    yield f"quantizer's training step, {spaced(SHAPES[0])}", mine, against, f"{times(peer)}; {times(torch)}"
    where = {"shape": "8x8192x1024x128"}
    ours, peer = (one("train_step.csv", provider=name, **where) for name in ("fastvq", "vq-pytorch"))
    name = "residual training step, 8 levels of 1024 x 128, 8192 rows"
    yield name, f"{ms(ours)} ms", f"vector-quantize-pytorch {ms(peer)} ms", times(peer)
    for name, shape, case in (
        ("masked convolution 16x128->256, 32x32, 5x5, forward", "16x128->256 32x32 5x5", "forward"),
        ("the same, forward and backward", "16x128->256 32x32 5x5", "forward+backward"),
        ("gated 16x256->512, 16x16, 3x3", "16x256->512 16x16 3x3", "gated eval"),
    ):
        ours, other = fastest_two("masked_conv.csv", shape, case)
        yield name, f"{ms(ours)} ms", f"the best of torch's six ways, {other['provider']}: {ms(other)} ms", times(other)
    ours, every, needed = (
        one("sampling.csv", shape="16x32x32", provider=name)
        for name in ("fastvq cached", "full recompute", "rows recompute")
    )
    seconds = [
        f"{float(r['p50_ms']) / 1000:.2g}" if r is ours else f"{float(r['p50_ms']) / 1000:.0f}"
        for r in (ours, every, needed)
    ]
    against = f"the network anew for each position {seconds[1]} s; only the rows it needs {seconds[2]} s"
    name = "sampling 16 maps of 32x32, 15 layers, 128 channels"
    yield name, f"{seconds[0]} s", against, f"{times(every)}; {times(needed)}"


def on_h100() -> Iterable[tuple[str, ...]]:
    for shape in ("1048576x1024x64", LARGE, "262144x16384x8", "65536x512x64"):
        cells = [spaced(shape)]
        by = {
            name: [one(f"{H100}lookup.csv", shape=shape, data=d, provider=name) for d in ("bfloat16", "float32")]
            for name in ("fastvq triton", "fastvq cuda", "flash-kmeans", "compiled cdist")
        }
        cells += ["; ".join(ms(row) for row in pair) for pair in by.values()]
        yield *cells, "; ".join(percent(row) for row in by["fastvq triton"])


def backends_by_op() -> Iterable[tuple[str, ...]]:
    for name, op in sorted(OPS.items()):
        depends = callable(op.order)
        order = [b for b in (ORDER if depends else op.order) if b in op.kernels]
        # The first paragraph of a function that makes an order says when it differs from the usual one.
        other = " ".join(op.order.__doc__.split("\n\n")[0].split()) if depends else ""
        golden = [b for b in order if op.kernels[b].golden]
        yield f"`{name}`", *(", ".join(f"`{b}`" for b in names) for names in (order, golden)), other


LOOKUP = "| rows x codes x width | fastvq ms | share of the ceiling |"
# (page, header of its table): the rows.
TABLES: dict[tuple[str, str], Callable[[], Iterable[tuple[str, ...]]]] = {
    (
        "README.md",
        f"| quantizer | rows ({CROSS} levels) {CROSS} codes {CROSS} width | milliseconds, before → after | faster |",
    ): readme_patched,
    ("README.md", "| | fastvq | against | faster |"): readme_speed,
    (
        "docs/performance.md",
        f"{LOOKUP} fastvq without VNNI | faiss flat L2 | `cdist` + argmin |",
    ): lookups,
    (
        "docs/performance.md",
        f"{LOOKUP} fastvq with VNNI | faiss flat L2 | `cdist` + argmin |",
    ): lookups_amx,
    ("docs/performance.md", "| | fastvq | against | faster |"): training,
    (
        "docs/performance.md",
        "| rows x codes x width | fastvq Triton | fastvq CUDA C++ | flash-kmeans (inexact) | compiled `cdist` | "
        "share of the limit |",
    ): on_h100,
    ("docs/backends.md", "| op | backends, the fastest first | known results first | another order |"): backends_by_op,
    ("docs/performance.md", "| quantizer | N x levels x K x D | ms | faster | MiB | other codes |"): all_patched,
}


def written(page: str, text: str) -> str:
    """The text of a page with the rows of its tables as the files have them."""
    for (place, header), made in TABLES.items():
        if place != page:
            continue
        lines = text.splitlines()
        start = lines.index(header) + 2
        end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
        lines[start:end] = ["| " + " | ".join(cells) + " |" for cells in made()]
        text = "\n".join(lines) + "\n"
    return text


if __name__ == "__main__":
    for name in sorted({page for page, _ in TABLES}):
        path = ROOT / name
        path.write_text(written(name, path.read_text()))
