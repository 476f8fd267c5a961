"""taming-transformers: ``VectorQuantizer2``, in whole, since the package is not on the index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvq.compat._lookup import image_quantize
from fastvq.compat._target import PatchedModule, PatchTarget, require

__all__ = ["TARGETS", "FastImageQuantizer", "VectorQuantizer2"]


class FastImageQuantizer(PatchedModule):
    """The forward that taming-transformers' and diffusers' class share."""

    def forward(
        self, z: Tensor, temp: Any = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:  # z [B, D, H, W]
        """As the peer's: (quantized, loss, (None, None, indices)); the last three arguments are the Gumbel one's."""
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError(
                f"{type(self).__name__}: temp, rescale_logits and return_logits are of the Gumbel quantizer; leave them"
            )
        # legacy puts beta on the codebook's side.
        weights = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        quantized, loss, indices = image_quantize(z.permute(0, 2, 3, 1), self.embedding.weight, *weights)
        if self.remap is not None:
            indices = self.remap_to_used(indices.flatten(1)).view(indices.shape)
            indices = indices if self.sane_index_shape else indices.reshape(-1, 1)
        elif not self.sane_index_shape:
            indices = indices.flatten()
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, (None, None, indices)


class VectorQuantizer2(FastImageQuantizer):
    """``VectorQuantizer2(n_e, e_dim, beta)`` with the peer's constructor, state and forward.

    .. math:: loss = \\mathrm{mean} |sg(c) - z|^2 + \\beta \\, \\mathrm{mean} |c - sg(z)|^2

    or with beta on the first term for ``legacy=False``. ``remap`` is not here: a table of used indices belongs to the
    peer's file; patch the peer's class for it.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: None = None,
        unknown_index: str = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        if remap is not None:
            raise ValueError("VectorQuantizer2: remap is not supported; use the peer's class and fastvq.patch")
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.remap, self.re_embed, self.sane_index_shape = None, n_e, sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """Codes of flat indices, as an image [B, D, H, W] where ``shape`` = (B, H, W, D) is given."""
        codes: Tensor = self.embedding(indices)
        return codes if shape is None else torch.movedim(codes.view(shape), -1, 1).contiguous()


TARGETS = (
    PatchTarget(
        peer="taming",
        name="VectorQuantizer2",
        modules=r"(taming|ldm)\.modules\.(vqvae|vector_quantization)\.quantize",
        fast=FastImageQuantizer,
        replaced_methods=("forward", "remap_to_used"),
        attributes=("remap",),
        reject=require(embedding__weight="2", e_dim="", beta="", legacy="", sane_index_shape=""),
        importable=("taming.modules.vqvae.quantize",),
    ),
)
