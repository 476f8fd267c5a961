"""Sentences and single cells of README and docs that state figures of benchmarks/results, made from the files.

tests/test_figures.py looks for each of them in its page.
"""

from __future__ import annotations

from collections.abc import Iterator

from results import H100, Result, best, fastest_two, ms, one, rows, times

__all__ = ["sentences"]

SHAPES = ("65536x1024x64", "65536x1024x256", "16384x8192x256", "65536x16384x8")
PERFORMANCE, MODELS = "docs/performance.md", "docs/models.md"
FRONT = ("README.md", "docs/index.md")
EXACTNESS, CONCEPTS = "docs/concepts/exactness.md", "docs/concepts/models.md"


def sentences() -> Iterator[tuple[str, str]]:
    """(page, text), with one space where the page may break its line."""
    yield from lookups()
    yield from convolutions()
    yield from on_h100()
    yield from patched()
    yield from models()


def lookups() -> Iterator[tuple[str, str]]:
    here = [r for r in rows("quantize.csv") if r["threads"] == "1" and r["shape"] in SHAPES]
    fastest = {shape: best("quantize.csv", shape=shape, threads="1") for shape in SHAPES}
    if {r["provider"] for r in fastest.values()} != {"faiss"}:
        raise ValueError(
            "quantize.csv: faiss is not the fastest peer at every shape; name the peers on both front pages"
        )
    ratios = [float(r["ratio"]) for r in fastest.values()]
    card = one(f"{H100}lookup.csv", shape="65536x512x64", data="float32", provider="flash-kmeans")
    for page in FRONT:
        yield page, f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as faiss on one CPU thread (four shapes)"
        yield page, f"the inexact flash-kmeans is faster at width 64 ({times(card)})"
    compared = {r["compared"] for r in here if r["provider"] == "fastvq avx512_vnni"}
    yield "README.md", f"in each of the {'/'.join(sorted(compared))} rows compared"
    ours = [float(r["extra_mib"]) for r in here if r["provider"] == "fastvq avx512_vnni"]
    theirs = [float(r["extra_mib"]) for r in here if r["provider"] == "cdist"]
    yield (
        PERFORMANCE,
        f"fastvq took {min(ours):.0f} to {max(ours):.0f} MiB beyond its input, `cdist` {min(theirs):.0f} MiB and more.",
    )
    zen = {
        name: [
            f"{float(one('quantize_zen4.csv', shape=s, provider=name, data='gaussian', threads='1')['p50_ms']):.0f}"
            for s in SHAPES
        ]
        for name in ("fastvq avx512_vnni", "faiss")
    }
    first, second = ("{}, {}, {} and {} ms".format(*zen[name]) for name in zen)
    yield PERFORMANCE, f"{first} for the same four shapes; faiss {second}."
    tiles = [
        float(r["ceiling_gflops"])
        for r in rows("quantize_amx.csv")
        if (r["provider"], r["threads"]) == ("fastvq amx", "1")
    ]
    yield PERFORMANCE, f"moved between {min(tiles) / 1e3:.1f} and {max(tiles) / 1e3:.1f} TFLOP/s within the run"
    wide = [r for r in here if not r["shape"].endswith("x8")]
    int16, float32 = (
        [float(r["rescored"]) for r in wide if r["provider"] == f"fastvq {isa}"] for isa in ("avx512_vnni", "avx512")
    )
    yield (
        EXACTNESS,
        f"Of Gaussian vectors {100 * min(int16):.0f} to {100 * max(int16):.0f} in 100 need that with 16-bit integers, "
        f"and 1 in {round(1 / min(float32), -3):.0f} to 1 in {round(1 / max(float32), -2):.0f} with float32",
    )
    amx, vnni = (
        one("quantize_amx.csv", shape="95832x1024x48", provider=name, threads="1")
        for name in ("fastvq amx", "fastvq avx512_vnni")
    )
    yield PERFORMANCE, f"({ms(amx)} ms against {ms(vnni)} ms)"


def convolutions() -> Iterator[tuple[str, str]]:
    """The best of torch's ways over fastvq's faster memory layout."""
    parts = []
    for name, case in (("forward", "forward"), ("forward and backward", "forward+backward"), ("gated", "gated eval")):
        shapes = {r["shape"] for r in rows("masked_conv_amx.csv") if r["case"] == case}
        ratios = [
            float(other["p50_ms"]) / float(ours["p50_ms"])
            for ours, other in (fastest_two("masked_conv_amx.csv", shape, case) for shape in shapes)
        ]
        parts.append(f"{name} {min(ratios):.1f} to {max(ratios):.1f}x")
    yield PERFORMANCE, ", ".join(parts)


def on_h100() -> Iterator[tuple[str, str]]:
    def found(file: str, provider: str, **wanted: str) -> Result:
        return one(f"{H100}{file}.csv", provider=provider, **wanted)

    shape = {"shape": "1048576x1024x64"}
    ours, add, scatter = (
        float(found("statistics", name, **shape)["p50_ms"]) for name in ("fastvq triton", "index_add_", "scatter_add_")
    )
    yield PERFORMANCE, f"takes {ours:.2f} ms; `index_add_` {add:.2f}, `scatter_add_` {scatter:.2f}."
    maps = {"shape": "16x32x32, 15 layers"}
    ours, again = (
        float(found("sampling", name, **maps)["p50_ms"])
        for name in ("fastvq triton, cached", "recompute a position, graph")
    )
    yield PERFORMANCE, f"takes {ours:.0f} ms, the uncached network as a graph {again / 1e3:.1f} s."
    cuda, triton, torch, peer = (
        float(found("training_step", name)["p50_ms"])
        for name in ("fastvq cuda", "fastvq triton", "tuned torch", "vq-pytorch")
    )
    yield (
        PERFORMANCE,
        f"takes {cuda:.1f} ms (CUDA C++) and {triton:.1f} ms (Triton); tuned torch {torch:.1f} ms, "
        f"vector-quantize-pytorch {peer:.0f} ms.",
    )


def patched() -> Iterator[tuple[str, str]]:
    before = [r for r in rows("drop_in.csv") if r["provider"] == "before"]
    ratios = [float(r["ratio"]) for r in before]
    yield "docs/index.md", f"A patched quantizer runs {min(ratios):.0f} to {max(ratios):.0f} times faster"
    yield "docs/index.md", f"[The table of all {len(before)} quantizers]"
    yield "README.md", f"[All {len(before)} quantizers]"
    for page in ("docs/index.md", "docs/start/patch.md"):
        most = max(float(r["differing"]) / float(r["compared"]) for r in before)
        yield page, f"at most {1e4 * most + 0.5:.0f} ids in 10,000 in our measurements"
    spare = [
        [float(r["extra_mib"]) for r in rows("drop_in.csv") if r["provider"] == side] for side in ("after", "before")
    ]
    ours, theirs = (f"{min(one_):.2g} to {max(one_):.0f} MiB" for one_ in spare)
    yield "docs/index.md", f"A call takes {ours} of memory beyond its input, where the peer takes {theirs}."


def models() -> Iterator[tuple[str, str]]:
    def value(what: str) -> float:
        found = [r for r in rows("model.csv") if r["what"].startswith(what)]
        return float(found[0]["value"])

    digits, photographs = (
        "training step, digits 28x28, K=256, D=16, hidden 64, batch 32",
        "training step, photographs 64x64, two levels, K=512, D=32, hidden 64, batch 16",
    )
    yield MODELS, f"{value('digits, PSNR of 500 held-out digits'):.1f} dB on held-out digits, all 256 codes in use"
    yield MODELS, f"| {value('digits, wall seconds in all'):.0f} s |"
    right = value("digits, classifier on held-out digits")
    asked = [value(f"digits, samples labelled as asked, temperature {t}") for t in ("1.0", "0.8")]
    yield MODELS, f"right on {right:.0%} of held-out digits".replace("%", " %")
    yield MODELS, f"{asked[0]:.0%} at temperature 1, {asked[1]:.0%} at 0.8".replace("%", " %")
    crops = "photographs, PSNR of 200 held-out crops, dB: "
    three = [value(crops + name) for name in ("top level alone", "two levels", "one level of as many")]
    yield MODELS, "| {:.1f} dB; {:.1f} dB; {:.1f} dB |".format(*three)
    top, two, five = (f"{value:.1f} dB" for value in three)
    yield CONCEPTS, f"The two levels reach {two}, one level {top}, and one level of five ids a position {five}"
    bits = [value(f"photographs, prior of the {name}") for name in ("top", "bottom given the top")]
    yield MODELS, "{:.1f}; {:.1f} bits an id, held out".format(*bits)
    share = [value(f"{step}: quantizers' share") for step in (digits, photographs)]
    yield MODELS, "| {:.0%}; {:.0%} |".format(*share).replace("%", " %")
    pairs = [
        [value(f"{step}: {name} over fastvq") for name in ("vector-quantize-pytorch", "reference backend")]
        for step in (digits, photographs)
    ]
    yield MODELS, "{:.1f}x; {:.1f}x (digits), {:.1f}x; {:.1f}x (photographs)".format(*pairs[0], *pairs[1])
    for name, digits_after in (("dense and uncached", 0), ("reference backend", 1)):
        drawn = [
            float(r["value"])
            for r in rows("model.csv")
            if r["part"] == "generate" and r["what"].endswith(f"{name} over fastvq")
        ]
        yield MODELS, "| " + "; ".join(f"{one_:.{digits_after}f}x" for one_ in drawn) + " |"
    network, table, frequency = (
        float(one("prior.csv", provider=name)["note"].split()[0])
        for name in ("PixelCNN", "Markov (above, left)", "frequency at position")
    )
    yield MODELS, f"needs {network:.2f} bits an id on held-out strips."
    yield MODELS, f"needs {table:.2f}; the frequency at each position {frequency:.2f}"
