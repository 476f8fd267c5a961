"""What the reference model achieves on digits, photographs and edits, trained as the command trains."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastvq.cli.pictures import PAIRED, edit_picture, grid, paired, save_image, usage_plot
from fastvq.cli.shared import count_codes, read_model, read_priors
from fastvq.cli.train import PRESETS, PRIOR_PRESETS, train_prior, train_vqvae
from fastvq.data import Digits, Loader, Photographs, normalise, psnr
from fastvq.models import Edited, Prior, edit
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.editing import region_mask

__all__ = ["digits", "photographs"]

Report = Callable[..., None]
SHOWN_CROPS = 8
PER_CLASS = 50  # samples that the classifier labels
TEMPERATURES = (1.0, 0.8)  # the last is the command's default
# 64x64 crops: (name, options of `fastvq train vqvae`). 64 ids; 64 + 256; 64 positions of 5 ids each.
PHOTOGRAPH_MODELS = {
    "top level alone, 8x8 ids": dict(levels=1, downsample=8),
    "two levels, 8x8 + 16x16 ids": dict(levels=2, downsample=4),
    "one level of as many ids, 8x8 of 5 (residual)": dict(levels=1, downsample=8, quantizer="residual", depth=5),
}
PHOTOGRAPH_PRIORS = dict(channels=64, layers=6, steps=500, batch_size=16, lr=2e-3)  # of the two levels
PHOTOGRAPH_OPTIONS = dict(hidden=32, codes=256, code_dim=32, batch_size=16, lr=2e-3)


class Classifier(nn.Module):
    """A small CNN that labels digits [B, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


def digits(folder: Path, figures: Path, report: Report, *, share: float = 1.0) -> None:
    """Trains model, prior and classifier; ``share`` of the steps, for a quick look."""
    model_folder, prior_folder = folder / "vqvae", folder / "prior"
    train_vqvae(
        "digits",
        model_folder,
        resume=True,
        device="cpu",
        save_every=400,
        steps=_steps(PRESETS["digits"]["steps"], share),
    )
    train_prior(
        model_folder,
        prior_folder,
        resume=True,
        device="cpu",
        save_every=500,
        steps=_steps(PRIOR_PRESETS["digits"]["steps"], share),
    )
    trained = [
        sum(s) for s in zip(_trained_seconds(model_folder), _trained_seconds(prior_folder / "level0"), strict=True)
    ]
    began = time.perf_counter(), time.process_time()
    model = read_model(model_folder)
    priors = read_priors(prior_folder, model, model_folder)
    held_out = Digits("held-out")
    images = normalise(held_out.pixels)
    maps = model.encode_maps(images)
    decoded = model.decode_maps(maps)
    report("digits, PSNR of 500 held-out digits, dB", float(psnr(images, decoded).mean()), ">=", 24,
           note=f"{maps[0].shape[1]}x{maps[0].shape[2]} map, mean over digits")  # fmt: skip
    used = float((count_codes(model, maps)[0] > 0).float().mean())
    report("digits, share of codes in use", used, ">", 0.8, note=f"K = {model.n_codes[0]}, on the held-out digits")
    shown = torch.arange(0, 500, 500 // 16)[:16]
    save_image(figures / "model_digits.png", grid(paired(images[shown], decoded[shown], 16), 16, title=PAIRED))
    save_image(figures / "model_usage.png", usage_plot(count_codes(model, maps)))

    classifier = _classifier(_steps(700, share))
    right = (classifier(images).argmax(1) == held_out.labels).float().mean()
    report("digits, classifier on held-out digits", float(right), ">=", 0.97)
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    for temperature in TEMPERATURES:
        drawn = model.generate(
            len(labels), labels, priors=priors, temperature=temperature, generator=torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            right = (classifier(drawn).argmax(1) == labels).float().mean()
        report(f"digits, samples labelled as asked, temperature {temperature}", float(right), ">=", 0.8,
               note=f"{PER_CLASS} of each class")  # fmt: skip
    first = drawn.view(10, PER_CLASS, 1, 28, 28)[:, :16].flatten(0, 1)
    title = f"drawn for each label, temperature {TEMPERATURES[-1]}"
    save_image(figures / "model_samples.png", grid(first, 16, title=title, rows=[str(c) for c in range(10)]))
    wall, busy = trained[0] + time.perf_counter() - began[0], trained[1] + time.process_time() - began[1]
    report("digits, wall seconds in all", wall, "<=", 600,
           note=f"{busy:.0f} processor seconds; load of the machine at the end {os.getloadavg()[0]:.1f}")  # fmt: skip
    _edits(model, priors, held_out, figures, report)


def photographs(folder: Path, figures: Path, report: Report, *, share: float = 1.0) -> None:
    """One level, two levels, and one level with as many ids, trained alike."""
    held_out = Photographs("held-out", 64)
    images = normalise(torch.stack([held_out.read(i).pixels for i in range(200)]))
    reached: dict[str, float] = {}
    models: dict[str, Autoencoder] = {}
    rows = [images[:SHOWN_CROPS]]
    for name, options in PHOTOGRAPH_MODELS.items():
        where = _folder(folder, options)
        train_vqvae("photographs", where, resume=True, device="cpu", save_every=100, steps=_steps(800, share),
                    **PHOTOGRAPH_OPTIONS, **options)  # type: ignore[arg-type]  # fmt: skip
        model = read_model(where)
        decoded = torch.cat([model.decode_maps(model.encode_maps(part)) for part in images.split(50)])
        reached[name] = float(psnr(images, decoded).mean())
        report(f"photographs, PSNR of 200 held-out crops, dB: {name}", reached[name])
        rows.append(decoded[:SHOWN_CROPS])
        models[name] = model
    top, two, _ = reached.values()
    report("photographs, two levels over the top alone, dB", two - top, ">=", 2)
    names = ["picture", *(n.partition(",")[0] for n in PHOTOGRAPH_MODELS)]
    save_image(figures / "model_photographs.png", grid(torch.cat(rows), SHOWN_CROPS, rows=names))
    second = list(PHOTOGRAPH_MODELS)[1]
    priors = _photograph_priors(folder, _folder(folder, PHOTOGRAPH_MODELS[second]), images, figures, report, share)
    _edit_photograph(models[second], priors, figures, report)


def _folder(folder: Path, options: dict) -> Path:
    return folder / f"photographs-{'-'.join(str(v) for v in options.values())}"


def _photograph_priors(
    folder: Path, model_folder: Path, images: Tensor, figures: Path, report: Report, share: float
) -> list[Prior]:
    """Priors over both levels, trained by the command for a few minutes, and new crops that they draw together."""
    where = folder / "photographs-prior"
    options = {**PHOTOGRAPH_PRIORS, "steps": _steps(PHOTOGRAPH_PRIORS["steps"], share)}
    train_prior(model_folder, where, resume=True, device="cpu", save_every=100, **options)  # type: ignore[arg-type]
    model = read_model(model_folder)
    priors = read_priors(where, model, model_folder)
    maps = model.encode_maps(images)
    for level, (prior, kind) in enumerate(zip(priors, ("top, 8x8", "bottom given the top, 16x16"), strict=True)):
        bits = -prior.log_prob(maps[level], None, maps[:level]).double().mean() / math.log(2)
        counts = count_codes(model, maps)[level].double()
        entropy = -torch.special.xlogy(counts / counts.sum(), counts / counts.sum()).sum() / math.log(2)
        report(f"photographs, prior of the {kind}: bits an id, held-out crops", float(bits),
               note=f"the frequencies of those crops' own ids need {entropy:.2f}")  # fmt: skip
    wall, busy = (sum(s) for s in zip(*(_trained_seconds(where / f"level{i}") for i in range(2)), strict=True))
    report("photographs, priors of both levels: processor seconds of training", busy,
           note=f"{wall:.0f} wall seconds; load of the machine at the end {os.getloadavg()[0]:.1f}")  # fmt: skip
    drawn = model.generate(2 * SHOWN_CROPS, priors=priors, generator=torch.Generator().manual_seed(0))
    names = ["held out", "drawn", "drawn"]
    page = grid(torch.cat([images[:SHOWN_CROPS], drawn]), SHOWN_CROPS, rows=names, title="top drawn, then bottom")
    save_image(figures / "model_photograph_samples.png", page)
    return priors


def _edit_photograph(model: Autoencoder, priors: list[Prior], figures: Path, report: Report) -> None:
    """A part of one photograph put into another, or drawn again, on a picture much larger than the crops that were
    trained on."""
    astronaut, cat = (normalise(Photographs("all", 64).photographs[i][None, :, 16:208, 100:292]) for i in (0, 1))
    box = (72, 72, 120, 120)
    done = {
        "48x48 of another photograph, two levels": edit(model, cat, box, source=astronaut),
        "48x48 of a photograph drawn again, two levels": edit(
            model, cat, box, prior=priors, n_candidates=16, generator=torch.Generator().manual_seed(0)
        ),
    }
    save_image(figures / "model_edit_photograph.png", _edit_pages(done, cat, box, report))


def _edits(model: Autoencoder, priors: list[Prior], held_out: Digits, figures: Path, report: Report) -> None:
    """One transplant and one redrawing, and what they change where nothing may change."""
    four, nine = (int((held_out.labels == c).nonzero()[3]) for c in (4, 9))
    images = normalise(held_out.pixels[[four, nine]])
    box = (4, 0, 24, 12)
    done = {
        "transplant of the upper half of a 9 into a 4": edit(model, images[:1], box, source=images[1:]),
        "upper half of a 4 drawn again as a 9": edit(
            model, images[:1], box, prior=priors, labels=9, n_candidates=16,
            generator=torch.Generator().manual_seed(1),
        ),
    }  # fmt: skip
    save_image(figures / "model_edit.png", _edit_pages(done, images[:1], box, report))


def _edit_pages(done: dict[str, Edited], image: Tensor, box: tuple[int, ...], report: Report) -> Image.Image:
    """Reports what edits of one picture changed inside and beyond their reach; one page of them all."""
    mask = region_mask(box, image)[0]
    pages = []
    for name, edited in done.items():
        difference = (edited.image - edited.reconstruction).abs().amax(1)
        report(f"edit, {name}: mean change inside the region", float(edited.inside_change), ">", 0.0)
        beyond = difference[~edited.reach]
        largest = float(beyond.max()) if beyond.numel() else 0.0
        report(f"edit, {name}: largest change beyond the reach", largest, "<=", 0.0,
               note=f"{beyond.numel()} of {difference.numel()} pixels lie beyond it")  # fmt: skip
        pages.append(edit_picture(image[0], edited.reconstruction[0], edited.image[0], mask, name))
    page = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), (255, 255, 255))
    top = 0
    for part in pages:
        page.paste(part, (0, top))
        top += part.height
    return page


def _trained_seconds(folder: Path) -> tuple[float, float]:
    """(wall, processor) seconds of a training by its log, those before a resume among them."""
    log = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return sum(line["seconds"] for line in log), sum(line["processor_seconds"] for line in log)


def _classifier(steps: int) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    batches = Loader(Digits(), 64, seed=0, augment="shift").batches()
    for _ in range(steps):
        batch = next(batches)
        F.cross_entropy(classifier(batch.images), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    batches.close()
    return classifier.eval()


def _steps(n: int, share: float) -> int:
    return max(10, int(n * share))
