"""The model of several levels: a small top map holds the overall structure, larger maps below it hold the detail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from fastvq.models.autoencoder import Autoencoder

__all__ = ["VQVAE2"]


class VQVAE2(Autoencoder):
    """Hierarchical VQ-VAE (Razavi et al. 2019). The top map is quantized and decoded first. The map below is encoded
    given the decoded top map, and the decoder gets both.

    Args:
        downsample: pixels a position of the bottom map, 2, 4 or 8; each level above doubles it.
        levels: number of levels; 2 is VQ-VAE-2's, 1 is ``VQVAE``.
        n_codes: codes of each level's dictionary: one number, or one a level, top first.
        in_channels, hidden, code_dim, n_blocks, quantizer, depth, loss, quantizer_options: as in ``VQVAE``.

    ``forward(image)`` returns ``AutoencoderOutput``: one map, perplexity and share of used codes a level, top first.

    Raises:
        ValueError: a size below 1, another downsample, a picture whose sides are not multiples of the top's stride.

    Example:
        >>> model = VQVAE2(3, 64, n_codes=512, code_dim=32, downsample=4)
        >>> [ids.shape for ids in model.encode(torch.rand(2, 3, 64, 64))]
        [torch.Size([2, 8, 8]), torch.Size([2, 16, 16])]
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        n_codes: int | Sequence[int],
        code_dim: int,
        downsample: int = 4,
        *,
        levels: int = 2,
        n_blocks: int = 2,
        quantizer: Literal["plain", "residual", "grouped"] = "plain",
        depth: int = 1,
        loss: Literal["mse", "l1"] = "mse",
        **quantizer_options: Any,
    ) -> None:
        super().__init__(
            in_channels,
            hidden,
            n_codes,
            code_dim,
            downsample,
            levels=levels,
            n_blocks=n_blocks,
            quantizer=quantizer,
            depth=depth,
            loss=loss,
            **quantizer_options,
        )
        self.config = {
            "in_channels": in_channels,
            "hidden": hidden,
            "n_codes": n_codes if isinstance(n_codes, int) else list(n_codes),
            "code_dim": code_dim,
            "downsample": downsample,
            "levels": levels,
            "n_blocks": n_blocks,
            "quantizer": quantizer,
            "depth": depth,
            "loss": loss,
            **quantizer_options,
        }

    def encode(
        self,
        image: Tensor,  # [B, C, H, W]
    ) -> list[Tensor]:
        """The id maps, top first: [B, h, w] int64 each, a level's sides twice those of the level above."""
        return self.encode_maps(image)

    def decode(
        self,
        maps: Sequence[Tensor],  # one a level, top first
    ) -> Tensor:
        """The pictures [B, C, H, W] of id maps; ValueError for maps that do not fit or ids that are not codes."""
        return self.decode_maps(maps)
