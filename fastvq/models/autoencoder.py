"""The base class of VQVAE and VQVAE2: encodes pictures to id maps on any number of levels, and decodes them.

Two levels, stride s at the bottom (``downsample``), 2 s at the top::

    picture -> encoder(s) -> features_1 -> encoder(2) -> features_0 -> quantizer_0 -> ids_0   top
                                 |                                        | codes
                                 |                    expand(2) <---------+
                                 +--------- join ---------+
                                             |            |
                                        quantizer_1 -> ids_1   bottom
                                             | codes      |
                                             +--- join ---+ -> decoder(s) -> picture

The top map is quantized and decoded first. Its decoded features are joined (concatenated) to the level below twice: to
that level's features before its quantizer, and to its codes after it. The second join goes to the level's decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvq._checks import FLOATS, check_dense, check_generator, check_indices, check_integer, check_option, check_sizes
from fastvq.models.blocks import Decoder, Encoder
from fastvq.models.checkpoints import Pretrained
from fastvq.models.prior import as_priors
from fastvq.models.quantizers import code_use, make_quantizer
from fastvq.ops import ResidualQuantized
from fastvq.ops._library import serialisable

__all__ = ["Autoencoder", "AutoencoderOutput"]

LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}
DOWNSAMPLES = (2, 4, 8)
# Selects the codes of one level: (level, features [B, D, h, w]) -> (codes [B, D, h, w], ids).
SelectCodes = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@serialisable("models.Output")
class AutoencoderOutput(NamedTuple):
    """Result of a forward pass; L levels, top first.

    Attributes:
        reconstruction: [B, C, H, W].
        loss: [], to minimise: reconstruction_loss + commitment_loss (+ codebook losses, where learnable).
        reconstruction_loss: [].
        commitment_loss: [], summed over levels, weighted.
        maps: L maps of ids, [B, h, w] or [B, h, w, Q], int64.
        perplexity: [L], of this batch.
        used: [L], share of the codes that this batch uses.
    """

    reconstruction: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    commitment_loss: Tensor
    maps: list[Tensor]
    perplexity: Tensor
    used: Tensor


class Autoencoder(Pretrained):
    """Base of ``VQVAE`` and ``VQVAE2``; the arguments are described there."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        n_codes: int | Sequence[int],
        code_dim: int,
        downsample: int,
        *,
        levels: int,
        n_blocks: int,
        quantizer: str,
        depth: int,
        loss: str,
        **quantizer_options: Any,
    ) -> None:
        super().__init__()
        op = f"fastvq.models.{type(self).__name__}"
        for name, value in (
            ("in_channels", in_channels),
            ("hidden", hidden),
            ("code_dim", code_dim),
            ("downsample", downsample),
            ("levels", levels),
            ("n_blocks", n_blocks),
            ("depth", depth),
        ):
            check_integer(op, name, value)
        if isinstance(n_codes, Sequence) and not isinstance(n_codes, str):
            check_sizes(op, "n_codes", n_codes)
            codes = list(n_codes)
        else:
            check_integer(op, "n_codes", n_codes)
            codes = [n_codes] * levels
        for name, value in (
            ("in_channels", in_channels),
            ("code_dim", code_dim),
            ("levels", levels),
            ("depth", depth),
            ("n_codes", min(codes, default=0)),
        ):
            if value < 1:
                raise ValueError(f"{op}: {name} must be at least 1, got {value}")
        if hidden < 4 or hidden % 4:
            raise ValueError(f"{op}: hidden must be a multiple of 4, for the widths of blocks, got {hidden}")
        if downsample not in DOWNSAMPLES:
            raise ValueError(f"{op}: downsample must be 2, 4 or 8, got {downsample}; more levels make smaller maps")
        if len(codes) != levels:
            raise ValueError(f"{op}: n_codes must be one number, or one a level ({levels}), got {codes}")
        check_option(op, "loss", loss, LOSSES)
        self.op, self.in_channels, self.n_codes, self.levels, self.loss = op, in_channels, codes, levels, loss
        self.depth = depth
        self.strides = [downsample << (levels - 1 - level) for level in range(levels)]
        inner = [Encoder(hidden, hidden, 2, n_blocks) for _ in range(levels - 1)]
        # Encoders are in the order they run in: from the picture up to the top level. ``before`` (convolutions ahead of
        # each quantizer) and ``expands`` (upsamplers between levels) go from the top down. Saved weights have these
        # names, so the attributes keep them.
        self.encoders = nn.ModuleList([Encoder(in_channels, hidden, downsample, n_blocks), *inner])
        self.before = nn.ModuleList(nn.Conv2d(2 * hidden if i else hidden, code_dim, 1) for i in range(levels))
        self.quantizers = nn.ModuleList(
            make_quantizer(op, quantizer, code_dim, k, depth, **quantizer_options) for k in codes
        )
        self.expands = nn.ModuleList(
            Decoder(code_dim + (hidden if i else 0), hidden, hidden, 2, n_blocks) for i in range(levels - 1)
        )
        decoder_channels = code_dim + (hidden if levels > 1 else 0)
        self.decoder = Decoder(decoder_channels, hidden, in_channels, downsample, n_blocks)
        self.learnable = bool(quantizer_options.get("learnable", False))

    def forward(
        self,
        image: Tensor,  # [B, C, H, W] float, normalised (fastvq.data.normalise)
    ) -> AutoencoderOutput:
        losses: list[tuple[Tensor, Tensor]] = []

        def select_codes(level: int, features: Tensor) -> tuple[Tensor, Tensor]:
            q = self.quantizers[level](features)
            if isinstance(q, ResidualQuantized):
                losses.append((q.commitment_losses.sum(), q.codebook_losses.sum()))
            else:
                losses.append((q.commitment_loss, q.codebook_loss))
            return q.quantized, q.indices

        decoder_input, maps = self._run_levels(self._features(image), select_codes)
        reconstruction = self.decoder(decoder_input)
        reconstruction_loss = LOSSES[self.loss](reconstruction.float(), image.float())
        commitment_loss = torch.stack([c for c, _ in losses]).sum()
        loss = reconstruction_loss + commitment_loss
        if self.learnable:
            loss = loss + torch.stack([c for _, c in losses]).sum()
        use = [code_use(ids, k) for ids, k in zip(maps, self.n_codes, strict=True)]
        return AutoencoderOutput(
            reconstruction,
            loss,
            reconstruction_loss,
            commitment_loss,
            maps,
            torch.stack([p for p, _ in use]),
            torch.stack([u for _, u in use]),
        )

    @torch.no_grad()
    def encode_maps(
        self,
        image: Tensor,  # [B, C, H, W]
    ) -> list[Tensor]:
        """The id maps of pictures, top first: L tensors [B, h, w] (or [B, h, w, Q]), int64. No codebook is updated.

        Raises:
            ValueError: the picture has another number of channels, or a side that is not a multiple of the top level's
                stride.
        """

        def select_codes(level: int, features: Tensor) -> tuple[Tensor, Tensor]:
            ids = self._quantizer(level).encode(features)
            # The codes of the last level are not used.
            return self._codes(level, ids) if level + 1 < self.levels else features, ids

        return self._run_levels(self._features(image), select_codes)[1]

    @torch.no_grad()
    def decode_maps(
        self,
        maps: Sequence[Tensor],  # L maps, top first, [B, h, w] or [B, h, w, Q], any integer dtype
    ) -> Tensor:
        """The pictures [B, C, H, W] of id maps.

        Raises:
            ValueError: the number of maps is not the number of levels, a map is not twice as large as the one above,
                an id is not a code (checked on a CPU, elsewhere under FASTVQ_CHECK=1).
            TypeError: maps that are not integers.
        """
        maps = self._checked_maps(maps)
        decoder_input = self._codes(0, maps[0])
        for level in range(1, self.levels):
            above = self.expands[level - 1](decoder_input)
            decoder_input = torch.cat([self._codes(level, maps[level]), above], 1)
        return self.decoder(decoder_input)

    @torch.no_grad()
    def generate(
        self,
        n: int,
        labels: Tensor | int | None = None,  # [n] int64, or one for all
        *,
        priors: Any,  # one Prior a level, top first
        size: tuple[int, int] | None = None,  # (H, W) of the pictures
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> Tensor:
        """New pictures [n, C, H, W]. The top map is sampled from its prior, then each map below given the maps above;
        then the maps are decoded.

        Args:
            size: default: the size of the pictures that the priors were trained on.
            temperature, sampling (top_k, top_p, cached): ``PixelCNN.sample``'s, for all levels.
            generator: source of random numbers; the same seed gives the same pictures.

        Raises:
            ValueError: the number of priors is not the number of levels, a bare PixelCNN is given without ``size``,
                ``size`` is not a multiple of the top level's stride, labels are not [n] or out of range.
        """
        op = f"{self.op}.generate"
        check_integer(op, "n", n)
        check_generator(op, generator)
        if size is not None:
            check_sizes(op, "size", size)
        found = as_priors(op, priors, self.levels)
        if size is None and found[0].shape is None:
            raise ValueError(f"{op}: size must be given, (H, W) of the pictures: the prior holds none")
        if size is not None and (min(size) < 1 or any(side % self.strides[0] for side in size)):
            raise ValueError(f"{op}: size must be multiples of {self.strides[0]}, the top level's stride, got {size}")
        device = self.decoder.mix.weight.device
        if labels is not None:
            labels = torch.as_tensor(labels, dtype=torch.int64, device=device)
            labels = labels.expand(n) if labels.dim() == 0 else labels
            if labels.shape != (n,):
                raise ValueError(f"{op}: labels must be [{n}], one a picture, got {list(labels.shape)}")
        shapes = (
            self.map_shapes(*size)
            if size is not None
            else [(found[0].shape[0] << level, found[0].shape[1] << level) for level in range(self.levels)]
        )
        maps: list[Tensor] = []
        for prior, (h, w) in zip(found, shapes, strict=True):
            maps.append(prior.sample((n, h, w), labels, maps, temperature=temperature, generator=generator, **sampling))
        return self.decode_maps(maps)

    def reach(
        self,
        masks: Sequence[Tensor],  # L masks [B, h, w] bool, top first: the positions whose codes change
    ) -> Tensor:
        """[B, H, W] bool: the pixels that codes at those positions can change. All other pixels keep every bit."""
        reached = masks[0][:, None]
        for level in range(1, self.levels):
            reached = masks[level][:, None] | cast(Decoder, self.expands[level - 1]).reach(reached)
        return self.decoder.reach(reached)[:, 0]

    def map_shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        """The (h, w) of each level's map for a picture of that size, top first."""
        return [(height // s, width // s) for s in self.strides]

    def _features(self, image: Tensor) -> list[Tensor]:
        """Features of each level, top first."""
        stride = self.strides[0]
        if not isinstance(image, Tensor):
            raise TypeError(f"{self.op}: image must be a torch.Tensor, got {type(image).__name__}")
        check_dense(self.op, "image", image)
        if image.dtype not in FLOATS:
            raise TypeError(
                f"{self.op}: image must be floating-point, got {image.dtype}; scale it as the training pictures were, "
                "8-bit pictures of fastvq.data by fastvq.data.normalise"
            )
        if image.dim() != 4 or image.shape[1] != self.in_channels:
            raise ValueError(f"{self.op}: image must be [B, {self.in_channels}, H, W], got {list(image.shape)}")
        if image.shape[2] % stride or image.shape[3] % stride or 0 in image.shape[2:]:
            raise ValueError(
                f"{self.op}: H and W of image must be multiples of {stride}, the top level's stride, "
                f"got {list(image.shape)}; resize or pad it"
            )
        features: list[Tensor] = []
        for encoder in self.encoders:
            image = encoder(image)
            features.insert(0, image)
        return features

    def _run_levels(self, features: list[Tensor], select_codes: SelectCodes) -> tuple[Tensor, list[Tensor]]:
        """Runs the levels from the top to the bottom: (input of the decoder [B, decoder_channels, h, w], the maps)."""
        codes, ids = select_codes(0, self.before[0](features[0]))
        decoder_input, maps = codes, [ids]
        for level in range(1, self.levels):
            above = self.expands[level - 1](decoder_input)
            codes, ids = select_codes(level, self.before[level](torch.cat([features[level], above], 1)))
            decoder_input = torch.cat([codes, above], 1)
            maps.append(ids)
        return decoder_input, maps

    def _quantizer(self, level: int) -> Any:
        return self.quantizers[level]

    def _codes(self, level: int, ids: Tensor) -> Tensor:
        """Codes [B, D, h, w] in the dtype of the CNNs; codebooks stay float32 when a module is cast."""
        return self._quantizer(level).decode(ids).to(self.decoder.mix.weight.dtype)

    def _checked_maps(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps as int64."""
        if not hasattr(maps, "__len__"):
            raise TypeError(f"{self.op}: maps must be a sequence, one a level, got {type(maps).__name__}")
        if len(maps) != self.levels:
            raise ValueError(f"{self.op}: maps must be {self.levels}, one a level, top first, got {len(maps)}")
        maps = [
            check_indices(self.op, f"maps[{level}]", ids, 0, k)
            for level, (ids, k) in enumerate(zip(maps, self.n_codes, strict=True))
        ]
        n_dims = 3 if self.depth == 1 else 4
        for level, ids in enumerate(maps):
            if ids.dim() != n_dims or ids.shape[0] != maps[0].shape[0]:
                shape = "[B, h, w]" if self.depth == 1 else f"[B, h, w, {self.depth}]"
                raise ValueError(
                    f"{self.op}: maps[{level}] must be {shape} with one B on all levels, got {list(ids.shape)}"
                )
            expected = [side << level for side in maps[0].shape[1:3]]
            if list(ids.shape[1:3]) != expected:
                raise ValueError(
                    f"{self.op}: maps[{level}] must be {expected} positions, twice the level above, "
                    f"got {list(ids.shape[1:3])}"
                )
        return maps
