"""Editing a part of a picture: changes the ids of a region, and no others.

The region of pixels is mapped to positions on every level. Their ids are set, transplanted, swapped or sampled again,
and the maps are decoded. Pixels beyond the decoder's reach equal ``decode(encode(image))`` bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastvq._checks import check_generator, check_integer, check_sizes
from fastvq.models.autoencoder import Autoencoder
from fastvq.models.blocks import widen
from fastvq.models.prior import as_priors

__all__ = ["Edited", "edit", "positions", "region_mask"]

OP = "fastvq.models.edit"
Region = Sequence[int] | Tensor


class Edited(NamedTuple):
    """Result of an edit; L levels, top first.

    Attributes:
        image: [B, C, H, W] the edited picture.
        reconstruction: [B, C, H, W] decode(encode(image)), which the changes below are measured against.
        maps: L maps after the edit.
        changed: L masks [B, h, w] bool: the positions whose ids changed.
        inside_change: [B] mean absolute change of a pixel inside the region, before any blending.
        outside_change: [B] the same outside the region, where the decoder's reach crosses its edge.
        reach: [B, H, W] bool: the pixels that the changed ids can reach; all others keep every bit.
    """

    image: Tensor
    reconstruction: Tensor
    maps: list[Tensor]
    changed: list[Tensor]
    inside_change: Tensor
    outside_change: Tensor
    reach: Tensor


@torch.no_grad()
def edit(
    model: Autoencoder,
    image: Tensor,  # [B, C, H, W]
    region: Region,
    *,
    maps: Sequence[Tensor] | None = None,
    codes: Sequence[Tensor | int] | Tensor | int | None = None,
    source: Tensor | None = None,
    swap: Mapping[int, int] | Sequence[Mapping[int, int]] | None = None,
    prior: Any = None,
    labels: Tensor | int | None = None,
    n_candidates: int = 1,
    temperature: float = 1.0,
    blend: bool | int = False,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Edited:
    """Changes the ids of a region of pictures and decodes.

    Exactly one of ``codes``, ``source``, ``swap`` and ``prior`` must be given:

    Args:
        model: a ``VQVAE`` or ``VQVAE2``, in training or eval mode; no codebook is updated.
        image: normalised pictures, sides multiples of the top level's stride.
        region: a box (x0, y0, x1, y1) in pixels, x1 and y1 excluded, or a bool mask [H, W] or [B, H, W]. A position of
            a map is in the region if at least one of its pixels is.
        maps: the ids to start from, L maps [B, h, w] or [1, h, w]: for a picture that was edited before, the ``maps``
            of that edit. Default: those that ``image`` encodes to.
        codes: the new ids, one entry a level, top first: one id for all positions of the region; a map [h, w] or
            [B, h, w], of which only the region is read; or None to keep the level. A model of one level needs no
            list around the entry.
        source: other pictures, [B, C, H, W] or [1, C, H, W]; the region's ids are theirs, on all levels.
        swap: {old id: new id}, one mapping for all levels or one a level. All pairs apply at once, so {1: 2, 2: 1}
            exchanges two ids.
        prior: one ``Prior`` a level, top first. The region is sampled again in raster order, each id given all ids
            before it, the label and the maps above. Ids outside the region stay.
        labels: [B] or one for all, the prior's condition.
        n_candidates: with ``prior``, the number of drafts. Raster order does not look ahead, so a draft does not depend
            on the ids below and right of the region. Draft j is chosen with probability proportional to
            prod_i p(ids_i | before, draft j) over the positions i outside the region: sampling-importance-resampling
            of the region given everything around it (Rubin 1987), exact as n_candidates grows.
        temperature, sampling (top_k, top_p, cached, progress): for the drafts, as in ``PixelCNN.sample``.
        blend: True or the width of a ramp in pixels (True: one position of the bottom map). Outside the region the
            result fades to the original picture over the ramp. Beyond it ``image`` equals the original bit for bit.
        generator: source of random numbers.

    Returns:
        ``Edited``. Its changes are measured against ``decode(encode(image))``, not against the picture.

    Raises:
        ValueError: not exactly one of the four arguments is given; the region is empty, lies outside the picture or has
            the wrong shape; ``maps`` have another size than the picture's; an id is not a code; ``source`` has another
            shape; the priors are not one a level.

    Example:
        >>> edited = edit(model, picture, (8, 8, 16, 16), source=other)       # doctest: +SKIP
        >>> edited.outside_change < edited.inside_change                       # doctest: +SKIP
        tensor([True])
    """
    ways = [
        name for name, value in dict(codes=codes, source=source, swap=swap, prior=prior).items() if value is not None
    ]
    if len(ways) != 1:
        raise ValueError(f"{OP}: exactly one of codes, source, swap, prior must be given, got {ways or 'none'}")
    if not isinstance(model, Autoencoder):
        raise TypeError(f"{OP}: model must be a VQVAE or a VQVAE2, got {type(model).__name__}")
    check_integer(OP, "n_candidates", n_candidates)
    check_generator(OP, generator)
    if n_candidates < 1:
        raise ValueError(f"{OP}: n_candidates must be at least 1, got {n_candidates}")
    training = model.training
    model.eval()
    try:
        old_maps = model.encode_maps(image) if maps is None else _given_maps(model, image, maps)
        inside = region_mask(region, image)
        masks = [positions(inside, stride) for stride in model.strides]
        if codes is not None:
            new_maps = _set(model, old_maps, masks, codes)
        elif source is not None:
            new_maps = _transplant(model, image, old_maps, masks, source)
        elif swap is not None:
            new_maps = _swap(model, old_maps, masks, swap)
        else:
            new_maps = _resample(
                model, old_maps, masks, prior, labels, n_candidates, generator, temperature=temperature, **sampling
            )
        reconstruction = model.decode_maps(old_maps)
        edited = model.decode_maps(new_maps)
    finally:
        model.train(training)
    changed = [(a != b).flatten(3).any(-1) if a.dim() == 4 else a != b for a, b in zip(new_maps, old_maps, strict=True)]
    difference = (edited - reconstruction).abs().float().mean(1)  # [B, H, W]
    if blend:
        edited = _blend(edited, image, inside, model.strides[-1] if blend is True else int(blend))
    return Edited(
        edited,
        reconstruction,
        new_maps,
        changed,
        _mean(difference, inside),
        _mean(difference, ~inside),
        model.reach(changed),
    )


def _given_maps(model: Autoencoder, image: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps as int64 on the picture's device, one for each picture; ValueError where they are not its size."""
    checked = model._checked_maps(maps)
    batch, shapes = image.shape[0], model.map_shapes(*image.shape[2:])
    found = [tuple(ids.shape[1:3]) for ids in checked]
    if found != shapes or checked[0].shape[0] not in (1, batch):
        raise ValueError(
            f"{OP}: maps must be 1 or {batch} a level, of {shapes} positions as image has, "
            f"got {checked[0].shape[0]} of {found}"
        )
    return [ids.to(image.device).expand(batch, *ids.shape[1:]) for ids in checked]


def region_mask(
    region: Region,
    image: Tensor,  # [B, C, H, W]
) -> Tensor:
    """[B, H, W] bool of a box (x0, y0, x1, y1) or of a mask; ValueError where it is empty or does not fit."""
    batch, _, height, width = image.shape
    if isinstance(region, Tensor):
        if region.dtype != torch.bool or region.shape not in ((height, width), (batch, height, width)):
            raise ValueError(
                f"{OP}: region as a mask must be bool [{height}, {width}] or [{batch}, {height}, {width}], "
                f"got {region.dtype} {list(region.shape)}"
            )
        mask = region.to(image.device).expand(batch, height, width)
        if not mask.flatten(1).any(1).all():
            raise ValueError(f"{OP}: region must hold at least one pixel of every picture, and has none")
        return mask
    box = list(region)
    check_sizes(OP, "region", box)
    if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise ValueError(
            f"{OP}: region as a box must be (x0, y0, x1, y1) with 0 <= x0 < x1 <= {width} and "
            f"0 <= y0 < y1 <= {height}, got {box}"
        )
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=image.device)
    mask[:, box[1] : box[3], box[0] : box[2]] = True
    return mask


def positions(
    mask: Tensor,  # [B, H, W] bool
    stride: int,
) -> Tensor:
    """[B, H/stride, W/stride] bool: the positions of a map that hold a pixel of the mask."""
    return F.max_pool2d(mask[:, None].float(), stride)[:, 0] > 0


def _replace(ids: Tensor, mask: Tensor, new: Tensor) -> Tensor:
    return torch.where(mask[..., None] if ids.dim() == 4 else mask, new, ids)


def _set(model: Autoencoder, old_maps: list[Tensor], masks: list[Tensor], codes: Any) -> list[Tensor]:
    per_level = list(codes) if isinstance(codes, (list, tuple)) else [codes]
    if len(per_level) != model.levels:
        raise ValueError(f"{OP}: codes must be one entry a level ({model.levels}), top first, got {len(per_level)}")
    maps = []
    for level, (ids, new, mask) in enumerate(zip(old_maps, per_level, masks, strict=True)):
        if new is None:
            maps.append(ids)
            continue
        new = torch.as_tensor(new, device=ids.device)
        if new.dtype != torch.int64 or (new.dim() and new.shape not in (ids.shape, ids.shape[1:])):
            raise ValueError(
                f"{OP}: codes[{level}] must be one id, or int64 ids {list(ids.shape[1:])} or {list(ids.shape)}, "
                f"got {new.dtype} {list(new.shape)}"
            )
        maps.append(_checked(model, level, _replace(ids, mask, new.expand_as(ids)), "codes"))
    return maps


def _transplant(
    model: Autoencoder, image: Tensor, old_maps: list[Tensor], masks: list[Tensor], source: Tensor
) -> list[Tensor]:
    if source.dim() != 4 or source.shape[1:] != image.shape[1:] or source.shape[0] not in (1, image.shape[0]):
        raise ValueError(
            f"{OP}: source must be {list(image.shape)} like image, or one such picture, got {list(source.shape)}"
        )
    new = model.encode_maps(source)
    return [_replace(ids, mask, other.expand_as(ids)) for ids, mask, other in zip(old_maps, masks, new, strict=True)]


def _swap(model: Autoencoder, old_maps: list[Tensor], masks: list[Tensor], swap: Any) -> list[Tensor]:
    per_level = [swap] * model.levels if isinstance(swap, Mapping) else list(swap)
    if len(per_level) != model.levels:
        raise ValueError(f"{OP}: swap must be one mapping, or one a level ({model.levels}), got {len(per_level)}")
    maps = []
    for level, (ids, pairs, mask) in enumerate(zip(old_maps, per_level, masks, strict=True)):
        n_codes = model.n_codes[level]
        # A mapping for all levels may name old ids that this level lacks; its new ids must be codes here.
        new_id = torch.arange(n_codes, device=ids.device)
        for old, new in pairs.items():
            if not 0 <= new < n_codes:
                raise ValueError(f"{OP}: swap must give ids in 0 .. {n_codes - 1} on level {level}, got {old}: {new}")
            if 0 <= old < n_codes:
                new_id[old] = new
        maps.append(_replace(ids, mask, new_id[ids]))
    return maps


def _resample(
    model: Autoencoder,
    old_maps: list[Tensor],
    masks: list[Tensor],
    prior: Any,
    labels: Tensor | int | None,
    n_candidates: int,
    generator: torch.Generator | None,
    **sampling: Any,
) -> list[Tensor]:
    priors = as_priors(OP, prior, model.levels)
    batch, device = old_maps[0].shape[0], old_maps[0].device
    if labels is not None:
        labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
        labels = labels.expand(batch).repeat_interleave(n_candidates)
    drafts: list[Tensor] = []  # L maps [B * J, h, w], the J drafts of a picture together
    weight = torch.zeros(batch, n_candidates, dtype=torch.float32, device=device)
    for level_prior, ids, mask in zip(priors, old_maps, masks, strict=True):
        if ids.dim() != 3:
            raise ValueError(f"{OP}: prior needs one id a position, got maps {list(ids.shape)}")
        known, redrawn = ids.repeat_interleave(n_candidates, 0), mask.repeat_interleave(n_candidates, 0)
        sampled = level_prior.sample(
            tuple(known.shape), labels, drafts, known=known, keep=~redrawn, generator=generator, **sampling
        )
        if n_candidates > 1:
            score = level_prior.log_prob(sampled, labels, drafts).masked_fill(redrawn, 0)
            weight += score.flatten(1).sum(1).view(batch, n_candidates)
        drafts.append(sampled)
    source = generator.device if generator else device
    uniform = torch.rand(batch, 1, generator=generator, dtype=torch.float32, device=source).to(device)
    chosen = (weight.softmax(1).cumsum(1) < uniform).sum(1).clamp(max=n_candidates - 1)
    row = torch.arange(batch, device=device) * n_candidates + chosen
    return [ids[row] for ids in drafts]


def _checked(model: Autoencoder, level: int, ids: Tensor, argument: str) -> Tensor:
    if not 0 <= int(ids.min()) <= int(ids.max()) < model.n_codes[level]:
        raise ValueError(f"{OP}: {argument}[{level}] must hold ids in 0 .. {model.n_codes[level] - 1}")
    return ids


def _mean(difference: Tensor, mask: Tensor) -> Tensor:
    """[B]: the mean of [B, H, W] over the True positions of the mask; 0 where there are none."""
    return (difference * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def _blend(edited: Tensor, image: Tensor, inside: Tensor, width: int) -> Tensor:
    """``edited`` inside the region, ``image`` beyond ``width`` pixels of it, a linear ramp between."""
    alpha = inside[:, None].float()
    grown = inside[:, None]
    for step in range(1, width):
        grown = widen(grown, 1)
        alpha = torch.maximum(alpha, grown.float() * (1 - step / width))
    mixed = image + alpha.to(image.dtype) * (edited - image)
    # image + 1 * (edited - image) may round; inside the region the edited pixels must keep every bit.
    return torch.where(alpha >= 1, edited, mixed)
