"""``fastvq train vqvae`` and ``fastvq train prior``, on one process or under ``torchrun``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastvq._json import write_json
from fastvq.cli import shared
from fastvq.cli.pictures import PAIRED, grid, paired, save_image, usage_plot
from fastvq.cli.run_pictures import codebook_picture, id_pictures, loss_curve, read_losses
from fastvq.data import Loader, check_size, open_data
from fastvq.models import VQVAE, VQVAE2, Prior
from fastvq.models.autoencoder import Autoencoder
from fastvq.training import (
    ProcessContext,
    TrainConfig,
    autoencoder_objective,
    prior_objective,
    processes,
    run_folder,
    sigterm_stops,
    train,
)
from fastvq.training.state import STATE

__all__ = ["PRESETS", "PRIOR_PRESETS", "train_prior", "train_vqvae"]

# Default options of a training, by data set. Other sets use those of the photographs.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": dict(levels=1, codes=256, code_dim=16, hidden=64, steps=1600, batch_size=32, lr=2e-3, augment="shift"),
    "photographs": dict(
        levels=2, codes=512, code_dim=32, hidden=64, steps=3000, batch_size=16, lr=1e-3, augment="flip"
    ),
}
PRIOR_PRESETS: dict[str, dict[str, Any]] = {
    "digits": dict(channels=48, layers=5, steps=1500, batch_size=64, lr=2e-3, augment="shift"),
    "photographs": dict(channels=96, layers=8, steps=4000, batch_size=32, lr=1e-3, augment="flip"),
}
SHOWN = 32  # pictures of a reconstruction grid
SAMPLES, SAMPLE_CLASSES = 8, 10  # samples.png of a prior: samples of each class, and number of classes
RESUME = "the same command with --resume goes on from the last checkpoint, where there is one"
LOG, LOSS = "log.jsonl", "loss.png"
COUNTED = 256  # number of pictures for the usage plot

Data = Annotated[str | None, typer.Option(help="digits, photographs, torchvision:NAME, a folder, or tar shards")]
Out = Annotated[Path, typer.Option(help="folder of the run: model, checkpoint, log, pictures")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")]
Number = Annotated[int | None, typer.Option(help="the data's preset unless given")]
Rate = Annotated[float | None, typer.Option(help="the data's preset unless given")]
SaveEvery = Annotated[int, typer.Option(help="steps between two checkpoints, which --resume goes on from")]
LogEvery = Annotated[int, typer.Option(help="steps between two lines of log.jsonl")]


def train_vqvae(
    data: Annotated[
        str, typer.Option(help="digits, photographs, torchvision:NAME, a folder, or tar shards")
    ] = "digits",
    out: Out = shared.MODEL,
    resume: Resume = False,
    levels: Number = None,
    codes: Number = None,
    code_dim: Number = None,
    hidden: Number = None,
    downsample: Annotated[int, typer.Option(help="pixels a position of the bottom map: 2, 4 or 8")] = 4,
    blocks: Annotated[int, typer.Option(help="residual blocks of each CNN")] = 2,
    quantizer: Annotated[str, typer.Option(help="plain, residual or grouped")] = "plain",
    depth: Annotated[int, typer.Option(help="ids a position of a residual or grouped quantizer")] = 1,
    loss: Annotated[str, typer.Option(help="mse or l1")] = "mse",
    estimator: Annotated[str, typer.Option(help="straight_through or rotation")] = "straight_through",
    kmeans: Annotated[bool, typer.Option(help="begin with a codebook of means of the first batch")] = True,
    dead_codes: Annotated[float, typer.Option(help="replace codes used less often a batch than this; 0: never")] = 1.0,
    decay: Annotated[float, typer.Option(help="of the codes' moving averages")] = 0.95,
    steps: Number = None,
    batch_size: Number = None,
    accumulate: Annotated[int, typer.Option(help="micro-batches a step")] = 1,
    lr: Rate = None,
    clip: Annotated[float, typer.Option(help="largest norm of the gradients, 0 for none")] = 1.0,
    ema: Annotated[float, typer.Option(help="decay of the averaged weights, 0 for none")] = 0.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile")] = False,
    augment: Annotated[str | None, typer.Option(help="none, shift or flip")] = None,
    size: Annotated[int | None, typer.Option(help="side of the pictures")] = None,
    channels: Annotated[int | None, typer.Option(help="1 or 3")] = None,
    odd: Annotated[str, typer.Option(help="odd pictures (palette, transparency, 16 bits): skip or convert")] = "skip",
    field: shared.Field = None,
    seed: int = 0,
    save_every: SaveEvery = 200,
    log_every: LogEvery = 50,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Train a VQVAE (one level) or a VQVAE2 (more) on pictures."""
    preset = PRESETS.get(data, PRESETS["photographs"])
    chosen = _filled(
        preset,
        levels=levels,
        codes=codes,
        code_dim=code_dim,
        hidden=hidden,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        augment=augment,
    )
    with (
        shared.report_errors(RESUME),
        processes(device) as process,
        shared.output_folder(out, data),
        run_folder("fastvq train vqvae", out, process),
    ):
        source = open_data(data, "train", size=size, channels=channels, odd=odd, field=field)
        torch.manual_seed(seed)
        arguments: dict[str, Any] = dict(
            n_blocks=blocks,
            quantizer=quantizer,
            depth=depth,
            loss=loss,
            estimator=estimator,
            kmeans_init=kmeans,
            dead_code_threshold=dead_codes or None,
            decay=decay,
            update="manual",
        )
        if chosen["levels"] > 1:
            arguments["levels"] = chosen["levels"]
        make = VQVAE2 if chosen["levels"] > 1 else VQVAE
        model = make(source.channels, chosen["hidden"], chosen["codes"], chosen["code_dim"], downsample, **arguments)
        check_size("fastvq train vqvae", source.size, model.strides[0])
        config = TrainConfig(
            steps=chosen["steps"],
            batch_size=chosen["batch_size"],
            accumulate=accumulate,
            lr=chosen["lr"],
            clip=clip,
            ema=ema,
            precision="bf16" if bf16 else "float32",
            compile=compile_,
            seed=seed,
            save_every=save_every,
            log_every=log_every,
        )
        loader = Loader(
            source, config.batch_size, seed=seed, augment=chosen["augment"], rank=process.rank, world=process.world
        )
        if process.first:
            shared.write_data(out, data, source, odd, field)
        with (
            _remove_if_unsaved(out, process),
            sigterm_stops() as stop,
            shared.progress(config.steps, "vqvae", shown=process.first) as advance,
        ):
            train(
                model,
                autoencoder_objective,
                loader,
                config,
                out,
                place=process,
                resume=resume,
                on_step=advance,
                stop=stop,
                on_log=lambda line: advance(line["step"], f"psnr {line['psnr']:.2f} dB, codes {line['used_0']:.0%}"),
            )
        if process.first:
            _show_model(model, out, data, process.device, size=size, channels=channels, odd=odd, field=field)
            if source.skipped:
                write_json(out / "skipped.json", source.skipped)
            shared.show_skipped(source.skipped)


def train_prior(
    model: Annotated[Path, typer.Option(help="folder of the trained model")] = shared.MODEL,
    out: Out = shared.PRIOR,
    data: Data = None,
    resume: Resume = False,
    channels: Number = None,
    layers: Number = None,
    labels: Annotated[bool, typer.Option(help="condition on the labels, where the data has them")] = True,
    steps: Number = None,
    batch_size: Number = None,
    accumulate: Annotated[int, typer.Option(help="micro-batches a step")] = 1,
    lr: Rate = None,
    clip: Annotated[float, typer.Option(help="largest norm of the gradients, 0 for none")] = 1.0,
    ema: Annotated[float, typer.Option(help="decay of the averaged weights, 0 for none")] = 0.995,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile")] = False,
    augment: Annotated[str | None, typer.Option(help="none, shift or flip")] = None,
    seed: int = 0,
    save_every: SaveEvery = 200,
    log_every: LogEvery = 50,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Train a prior for every level of a model, the top's first; each goes to a folder levelN of --out."""
    with (
        shared.report_errors(RESUME),
        processes(device) as process,
        shared.output_folder(out, data),
        run_folder("fastvq train prior", out, process),
    ):
        autoencoder = shared.read_model(model, process.device)
        if autoencoder.depth > 1:
            raise ValueError(
                f"a prior needs one id a position, and {model} gives {autoencoder.depth}: train a plain one"
            )
        trained_on, options = shared.read_data(model)
        data = data or trained_on
        shared.check_outside(out, data)
        chosen = _filled(
            PRIOR_PRESETS.get(data, PRIOR_PRESETS["photographs"]),
            channels=channels,
            layers=layers,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            augment=augment,
        )
        source = open_data(data, "train", **options)
        with_labels = labels and source.n_classes is not None
        if process.first:
            shared.write_prior_model(out, model)
            shared.write_data(out, data, source, options["odd"], options.get("field"))
        priors: list[Prior] = []
        for level in range(autoencoder.levels):
            config = TrainConfig(
                steps=chosen["steps"],
                batch_size=chosen["batch_size"],
                accumulate=accumulate,
                lr=chosen["lr"],
                clip=clip,
                ema=ema,
                precision="bf16" if bf16 else "float32",
                compile=compile_,
                seed=seed + level,
                save_every=save_every,
                log_every=log_every,
            )
            torch.manual_seed(config.seed)
            prior = Prior(
                autoencoder.n_codes[level],
                chosen["channels"],
                chosen["layers"],
                source.n_classes if with_labels else None,
                above=[(autoencoder.n_codes[i], 1 << (level - i)) for i in range(level)],
                shape=autoencoder.map_shapes(source.size, source.size)[level],
            )
            loader = Loader(
                source,
                config.batch_size,
                seed=config.seed,
                augment=chosen["augment"],
                rank=process.rank,
                world=process.world,
            )
            objective = prior_objective(autoencoder, level, with_labels=with_labels)
            with (
                _remove_if_unsaved(out, process),
                sigterm_stops() as stop,
                shared.progress(config.steps, f"prior {level}", shown=process.first) as advance,
            ):
                train(
                    prior,
                    objective,
                    loader,
                    config,
                    out / f"level{level}",
                    place=process,
                    resume=resume,
                    stop=stop,
                    on_step=advance,
                    on_log=partial(_show_bits, advance),
                )
            priors.append(prior)
        if process.first:
            _show_priors(autoencoder, priors, out, process.device)
            shared.show_skipped(source.skipped)


@contextmanager
def _remove_if_unsaved(out: Path, process: ProcessContext) -> Iterator[None]:
    """Removes the files of a run that fails before a step is logged or saved."""
    try:
        yield
    except BaseException:
        levels = [out, *out.glob("level*")]
        logs = [folder / LOG for folder in levels if (folder / LOG).is_file()]
        if process.first and not any((folder / STATE).exists() for folder in levels) and not any(map(_size, logs)):
            events = [path for folder in levels for path in folder.glob("events.out.tfevents.*")]
            for path in (out / shared.DATA, out / shared.PRIOR_MODEL, *logs, *events):
                path.unlink(missing_ok=True)
            for folder in levels[1:]:
                with contextlib.suppress(OSError):  # it holds other files
                    folder.rmdir()
        raise


def _size(path: Path) -> int:
    return path.stat().st_size


def _show_bits(advance: Callable[..., None], line: dict[str, Any]) -> None:
    advance(line["step"], f"{line['bits_per_id']:.3f} bits an id")


def _show_priors(model: Autoencoder, priors: list[Prior], out: Path, device: torch.device) -> None:
    """Writes samples.png: new pictures, one row for each of the first classes if the prior has classes."""
    n_classes = min(priors[0].n_classes or 0, SAMPLE_CLASSES)
    labels = torch.arange(n_classes).repeat_interleave(SAMPLES) if n_classes else None
    generator = torch.Generator(device).manual_seed(0)
    images = model.generate(SAMPLES * max(n_classes, 2), labels, priors=priors, temperature=0.8, generator=generator)
    rows = [str(c) for c in range(n_classes)]
    save_image(out / "samples.png", grid(images, SAMPLES, title="samples, temperature 0.8", rows=rows))
    for level in range(len(priors)):
        folder = out / f"level{level}"
        save_image(
            folder / LOSS, loss_curve(read_losses(folder / LOG), f"level {level}: loss of a step, in nats an id")
        )
    shared.console.print(
        f"{out}: levelN/ holds the prior of each level, its {LOG} and {LOSS}\npictures: {out / 'samples.png'}",
        highlight=False,
        soft_wrap=True,
    )


def _filled(preset: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {**preset, **{name: value for name, value in given.items() if value is not None}}


def _show_model(model: Autoencoder, out: Path, data: str, device: torch.device, **options: Any) -> None:
    """Writes pictures of the run, and of held-out pictures if there are any; prints where they are."""
    images, _ = shared.some_pictures(data, COUNTED, **options)
    maps = model.encode_maps(images.to(device))
    shown, columns = images[:SHOWN], 8
    decoded = model.decode_maps([ids[:SHOWN] for ids in maps]).cpu()
    made = {
        "reconstructions.png": grid(paired(shown, decoded, columns), columns, title=PAIRED),
        "ids.png": id_pictures(images[:columns], [ids[:columns] for ids in maps], model.n_codes),
        LOSS: loss_curve(read_losses(out / LOG), "loss of a step"),
    }
    if model.depth == 1:
        counts = shared.count_codes(model, maps)
        made |= {"usage.png": usage_plot(counts), "codebook.png": codebook_picture(model, counts)}
    for name, picture in made.items():
        save_image(out / name, picture)
    shared.console.print(
        f"{out}: the model and {LOG}\npictures: {', '.join(str(out / name) for name in made)}",
        highlight=False,
        soft_wrap=True,
    )
