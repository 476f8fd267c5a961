"""``fastvq decode``: decodes the id maps of ``fastvq encode`` to pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fastvq._files import lock_folder
from fastvq._json import read_json
from fastvq.cli import shared
from fastvq.cli.file_names import FileNames
from fastvq.cli.id_shards import MANIFEST_KIND, check_listed, find_manifest, load_shard
from fastvq.cli.pictures import save_picture
from fastvq.training import find_device
from fastvq.training.log import write_line

__all__ = ["decode"]

OP = "fastvq decode"
LOG = "log.jsonl"


def decode(
    ids: Annotated[Path, typer.Argument(help="folder that `fastvq encode` wrote")],
    out: Annotated[Path, typer.Option(help="folder that gets the pictures")] = Path("decoded"),
    model: Annotated[Path, typer.Option(help="folder of the model that made the ids")] = shared.MODEL,
    limit: Annotated[int | None, typer.Option(min=1, help="pictures at most")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
) -> None:
    """Decode maps of code ids to pictures. cats/a.jpg becomes cats/a.jpg.png: .png is added to every name, and folders
    stay. A name that comes again, in upper or lower case, ends in %2F2.png, the next in %2F3.png; characters that no
    file can have are written as % and two digits. No two pictures get one file."""
    with (
        shared.report_errors("the same command starts anew"),
        shared.raise_on_sigterm(),
        shared.output_folder(out),
        lock_folder(OP, out),
    ):
        torch_device = find_device(device)
        autoencoder = shared.read_model(model, torch_device)
        manifest = read_json(OP, find_manifest(OP, ids), MANIFEST_KIND)
        if manifest["model_sha256"] != shared.fingerprint(model):
            raise ValueError(f"{ids} was made by another model than {model}; its ids mean nothing to this one")
        shared.check_outside(out, manifest["data"])
        if not manifest["pictures"]:
            raise ValueError(f"{ids} holds no picture")
        total = min(manifest["pictures"], limit or manifest["pictures"])
        done, files = 0, FileNames()
        with shared.progress(total, "decode") as advance:
            for shard in manifest["shards"]:
                if done >= total:
                    break
                start, before = time.perf_counter(), done
                path = ids / Path(shard["name"]).name
                loaded = load_shard(OP, path, autoencoder.n_codes)
                check_listed(OP, path, shard, loaded)
                names = loaded.names
                for first in range(0, min(len(names), total - done), batch_size):
                    last = min(first + batch_size, len(names), first + total - done)
                    maps = [ids[first:last].long() for ids in loaded.maps]
                    images = autoencoder.decode_maps([m.to(torch_device) for m in maps])
                    for name, image in zip(names[first:last], images, strict=True):
                        save_picture(out / files.path(name), image)
                    done += last - first
                    advance(done)
                seconds = time.perf_counter() - start
                write_line(out / LOG, {"shard": shard["name"], "pictures": done - before, "seconds": round(seconds, 3)})
        shared.console.print(f"{out}: {done} pictures", highlight=False, soft_wrap=True)
