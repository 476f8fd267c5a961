"""The one-level model: a picture becomes one map of code ids."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from fastvq.models.autoencoder import Autoencoder

__all__ = ["VQVAE"]


class VQVAE(Autoencoder):
    """Encoder CNN, quantizer, decoder CNN (van den Oord et al. 2017).

    .. math::
        ids = \\mathrm{nearest}(encoder(x), codebook), \\quad \\hat x = decoder(codebook[ids]), \\quad
        loss = \\|x - \\hat x\\| + commitment

    Args:
        in_channels: channels C of the pictures, any number.
        hidden: width of the CNNs, a multiple of 4.
        n_codes: codes K in the dictionary.
        code_dim: length D of a code.
        downsample: 2, 4 or 8 pixels a position: a picture [B, C, H, W] becomes ids [B, H/downsample, W/downsample].
        n_blocks: residual blocks of the encoder and of the decoder.
        quantizer: "plain" (one id a position), "residual" or "grouped" (``depth`` ids a position, [B, h, w, depth]).
        loss: "mse" or "l1", the mean over all pixels.
        quantizer_options: further arguments of ``fastvq.nn``'s quantizer: decay, estimator, metric, commitment_weight,
            kmeans_init, dead_code_threshold, update, ...

    ``forward(image)`` returns ``AutoencoderOutput(reconstruction, loss, reconstruction_loss, commitment_loss, maps,
    perplexity, used)``; ids are exact, the same on every backend. Under autocast the CNNs run in autocast's dtype; the
    lookup and the codebook keep their precision.

    Raises:
        ValueError: a size below 1, another downsample, a picture whose sides are not multiples of it.

    Example:
        >>> model = VQVAE(3, 64, n_codes=512, code_dim=32, downsample=4)
        >>> model.encode(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 16, 12])
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        n_codes: int,
        code_dim: int,
        downsample: int = 4,
        *,
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
            levels=1,
            n_blocks=n_blocks,
            quantizer=quantizer,
            depth=depth,
            loss=loss,
            **quantizer_options,
        )
        self.config = {
            "in_channels": in_channels,
            "hidden": hidden,
            "n_codes": n_codes,
            "code_dim": code_dim,
            "downsample": downsample,
            "n_blocks": n_blocks,
            "quantizer": quantizer,
            "depth": depth,
            "loss": loss,
            **quantizer_options,
        }

    def encode(
        self,
        image: Tensor,  # [B, C, H, W]
    ) -> Tensor:
        """The id map [B, h, w] int64 (with a residual or grouped quantizer [B, h, w, depth])."""
        return self.encode_maps(image)[0]

    def decode(
        self,
        ids: Tensor,  # [B, h, w] int64
    ) -> Tensor:
        """The pictures [B, C, H, W] of id maps; ValueError for ids that are not codes."""
        return self.decode_maps([ids])
