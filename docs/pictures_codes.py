"""Pictures of codes, lookups, learning and the certificate, none of which needs a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastvq
from fastvq import ops
from fastvq.models import PixelCNN
from fastvq.nn import MaskedConv2d, VectorQuantizer

__all__ = ["INK", "PICTURES", "RED", "bare"]

INK, RED, BLUE, GREY = "#2b2d42", "#d1495b", "#3d6ea5", "#8d99ae"
PATCH = 4


def bare(panel: Any, title: str = "") -> Any:
    panel.set(xticks=[], yticks=[], title=title)
    return panel


def patches() -> Figure:
    """A photograph, its id map, the codebook as swatches, and the picture that the ids stand for."""
    from skimage import data

    photograph = torch.from_numpy(data.astronaut()[:256, 96:352].copy()).float() / 255
    side = photograph.shape[0] // PATCH
    rows = photograph.reshape(side, PATCH, side, PATCH, 3).permute(0, 2, 1, 3, 4).reshape(side * side, -1)
    codebook = fastvq.kmeans(rows, 64, generator=torch.Generator().manual_seed(0)).codebook
    codebook = codebook[codebook.sum(1).argsort()]  # dark to bright
    ids = ops.nearest(rows, codebook)
    decoded = codebook[ids].reshape(side, side, PATCH, PATCH, 3).permute(0, 2, 1, 3, 4).reshape(photograph.shape)
    swatches = torch.ones(8 * (PATCH + 1) - 1, 8 * (PATCH + 1) - 1, 3)
    for k, code in enumerate(codebook):
        y, x = (PATCH + 1) * (k // 8), (PATCH + 1) * (k % 8)
        swatches[y : y + PATCH, x : x + PATCH] = code.reshape(PATCH, PATCH, 3)
    figure, panels = plt.subplots(1, 4, figsize=(11, 3))
    for panel, image, title in zip(
        panels,
        (photograph, swatches, ids.view(side, side), decoded),
        ("photograph", "codebook: 64 codes", f"id map, {side} x {side}", "what the ids stand for"),
        strict=True,
    ):
        bare(panel, title).imshow(image.clamp(0, 1) if image.dim() == 3 else image, cmap="nipy_spectral")
    return figure


def regions() -> Figure:
    """The plane cut into the regions of 12 codes, with vectors and the codes that they are replaced by."""
    codes, x = torch.randn(12, 2), torch.randn(60, 2)
    axis = torch.linspace(-3, 3, 400)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    figure, panel = plt.subplots(figsize=(5, 5))
    ids = ops.nearest(plane, codes)
    panel.imshow(ids, origin="lower", extent=(-3, 3, -3, 3), cmap="tab20", alpha=0.35, interpolation="nearest")
    chosen = codes[ops.nearest(x, codes)]
    panel.plot(torch.stack([x[:, 0], chosen[:, 0]]), torch.stack([x[:, 1], chosen[:, 1]]), color=GREY, lw=0.8)
    panel.scatter(*x.T, s=12, color=INK, label="vectors", zorder=2)
    panel.scatter(*codes.T, s=70, color=RED, marker="X", label="codes", zorder=3)
    panel.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
    panel.legend(loc="upper left", framealpha=0.9)
    return figure


def learning() -> Figure:
    """Codes that follow their vectors by moving averages, without and with the replacement of dead codes."""
    centres = torch.tensor([[-2.0, -1.5], [2.0, -1.5], [0.0, 2.0], [2.4, 1.8]])
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2))
    for panel, threshold in zip(panels, (None, 0.5), strict=True):
        torch.manual_seed(3)
        vq = VectorQuantizer(2, 6, decay=0.9, dead_code_threshold=threshold)
        vq.codebook.data.copy_(torch.randn(6, 2) * 0.3 - torch.tensor([2.5, -1.0]))
        vq.embed_sum.copy_(vq.codebook * vq.cluster_size[:, None])
        path = [vq.codebook.detach().clone()]
        for _ in range(60):
            x = centres[torch.randint(4, (64,))] + 0.35 * torch.randn(64, 2)
            vq(x)
            path.append(vq.codebook.detach().clone())
        steps = torch.stack(path)
        panel.scatter(*(centres[torch.randint(4, (400,))] + 0.35 * torch.randn(400, 2)).T, s=5, color=GREY, alpha=0.5)
        for k in range(6):
            panel.plot(*steps[:, k].T, color=BLUE, lw=0.9)
        panel.scatter(*steps[0].T, s=30, facecolors="none", edgecolors=INK, label="codes at the start")
        panel.scatter(*steps[-1].T, s=70, color=RED, marker="X", label="after 60 steps")
        used = ops.nearest(centres.repeat(100, 1) + 0.35 * torch.randn(400, 2), steps[-1]).unique().numel()
        what = "moving averages alone" if threshold is None else "and dead codes replaced"
        bare(panel, f"{what}: {used} of 6 codes in use")
    panels[0].legend(loc="lower center", framealpha=0.9)
    return figure


def estimators() -> Figure:
    """The gradient that reaches a vector: copied from its code, or turned and scaled with it."""
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 4.2))
    code = torch.tensor([[2.0, 0.6]])
    angle = torch.tensor([0.2, 0.9, 1.6, -0.5])
    x = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([2.6, 1.6, 1.2, 1.9])[:, None]
    pull = torch.tensor([0.6, -0.35])
    for panel, estimator in zip(panels, ("straight_through", "rotation"), strict=True):
        rows = x.clone().requires_grad_()
        q = ops.quantize(rows, code, estimator=estimator)
        (gradient,) = torch.autograd.grad((q.quantized * pull).sum(), rows)
        panel.quiver(*x.T, *gradient.T, color=BLUE, angles="xy", scale_units="xy", scale=1, width=0.009)
        panel.quiver(*code.T, *pull[:, None], color=RED, angles="xy", scale_units="xy", scale=1, width=0.009)
        panel.plot(torch.zeros(2, len(x)), torch.zeros(2, len(x)), color=GREY)
        for row in x:
            panel.plot([0, row[0]], [0, row[1]], color=GREY, lw=0.6)
        panel.plot([0, code[0, 0]], [0, code[0, 1]], color=RED, lw=0.6)
        panel.scatter(*x.T, s=18, color=INK, zorder=3, label="vectors, and the gradient that reaches each")
        panel.scatter(*code.T, s=70, color=RED, marker="X", zorder=3, label="their code, and the gradient there")
        panel.set(xlim=(-0.8, 4), ylim=(-2.2, 2.4), aspect="equal")
        bare(panel, estimator.replace("_", "-"))
    panels[0].legend(loc="lower left", fontsize=8, framealpha=0.9)
    return figure


def seen_by(letters: Sequence[str], kernel: int, side: int, row: int | None = None) -> Tensor:  # [side, side]
    """Which positions one output of masked convolutions sees, by its gradient."""
    stack = nn.Sequential(*[MaskedConv2d(1, 1, kernel, mask=letter, bias=False) for letter in letters])
    for layer in stack:
        nn.init.ones_(layer.weight)
    image = torch.zeros(1, 1, side, side, requires_grad=True)
    output = stack(image)[0, 0, side // 2 if row is None else row, side // 2]
    return torch.autograd.grad(output, image)[0][0, 0]


def masks() -> Figure:
    """Masks of a 5 x 5 kernel, and what a stack of them sees, by the gradient of one output."""
    figure, panels = plt.subplots(1, 4, figsize=(11, 3))
    for panel, letter in zip(panels, "AB", strict=False):
        bare(panel, f"mask {letter}").imshow(seen_by([letter], 5, 5) != 0, cmap="Blues", vmin=0, vmax=1.6)
        panel.add_patch(plt.Rectangle((1.5, 1.5), 1, 1, fill=False, ec=RED, lw=2))
        panel.set(xticks=torch.arange(-0.5, 5), yticks=torch.arange(-0.5, 5), xticklabels=[], yticklabels=[])
        panel.grid(color="white")
        panel.tick_params(length=0)
    seen_by_stack = seen_by("ABBBB", 3, 15, row=10)
    torch.manual_seed(0)
    network = PixelCNN(4, channels=8, n_layers=5, first_kernel_size=3)
    held: list[Tensor] = []
    network.embedding.register_forward_hook(lambda module, given, made: held.append(made))
    logits = network(torch.zeros(1, 15, 15, dtype=torch.int64))
    seen = torch.autograd.grad(logits[0, :, 10, 7].square().sum(), held[0])[0][0].abs().sum(-1)
    titles = ("five masked layers: a blind spot", "PixelCNN, two stacks: none")
    for panel, gradient, title in zip(panels[2:], (seen_by_stack, seen), titles, strict=True):
        bare(panel, title).imshow(gradient != 0, cmap="Blues", vmin=0, vmax=1.6)
        panel.add_patch(plt.Rectangle((6.5, 9.5), 1, 1, fill=False, ec=RED, lw=2))
    return figure


def filtered(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(score, bound, exact score) of 9 codes for one vector, with operands rounded to 3 bits of mantissa."""
    generator = torch.Generator().manual_seed(seed)
    codes, x = (torch.randn(*shape, 6, generator=generator, dtype=torch.float64) for shape in ((9,), ()))
    low_codes, low_x = (t.float().to(torch.float8_e4m3fn).double() for t in (codes, x))
    bias = codes.square().sum(1) / 2
    # |x c - x^ c^| <= |x - x^| |c^| + |x| |c - c^|, by Cauchy-Schwarz, with both roundings measured.
    bound = (x - low_x).norm() * low_codes.norm(dim=1) + x.norm() * (codes - low_codes).norm(dim=1)
    return low_codes @ low_x - bias, bound, codes @ x - bias


def certificate() -> Figure:
    """Scores of a filter with their proven bounds: one code certified, and two left to the definition."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for panel, candidates in zip(panels, (1, 2), strict=True):
        for seed in range(1000):
            score, bound, exact = filtered(seed)
            floor = (score - bound).max()
            if int((score + bound >= floor).sum()) == candidates and score.argmax() == exact.argmax():
                break
        for at, k in enumerate((score + bound).argsort(descending=True)[:5]):
            colour = RED if score[k] + bound[k] >= floor else GREY
            panel.errorbar(at, score[k], yerr=bound[k], color=colour, capsize=5, marker="o", ms=4, lw=2)
            panel.plot(at, exact[k], marker="x", ms=6, color=INK)
        panel.axhline(floor, color=RED, lw=0.9, ls="--")
        panel.set(xticks=[], xlabel="codes", title="1 candidate: certified" if candidates == 1 else "2 candidates")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("score, larger is nearer")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "patches": patches,
    "regions": regions,
    "learning": learning,
    "estimators": estimators,
    "masks": masks,
    "certificate": certificate,
}
