"""transformers: the quantizers of Encodec, Xcodec, Higgs, Mimi, DAC, Chameleon, Janus, Emu3 and GLM-Image.

Higgs projects every residual down and every code up again, so its levels stay its own, made of a patched codebook.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvq.compat._dac import FastDacResidualVectorQuantizer, FastDacVectorQuantize
from fastvq.compat._exports import subclasses_of
from fastvq.compat._lookup import image_quantize, nearest
from fastvq.compat._residual import FastResidual
from fastvq.compat._target import PatchedModule, PatchTarget, require

__all__ = [
    "TARGETS",
    "FastEmu3Quantizer",
    "FastEncodecResidual",
    "FastEuclideanCodebook",
    "FastGlmImageQuantizer",
    "FastMimiCodebook",
    "FastMimiResidual",
    "FastVQVAEQuantizer",
    "FastXcodecResidual",
]


class FastEuclideanCodebook(PatchedModule):
    """Encodec, Xcodec, Higgs."""

    def quantize(self, hidden_states: Tensor) -> Tensor:  # [N, D] -> [N]
        return nearest(hidden_states, self.embed)


class FastMimiCodebook(PatchedModule):
    """Mimi; ``embed`` stays the peer's cached quotient."""

    def quantize(self, hidden_states: Tensor) -> Tensor:  # [N, D] -> [N]
        return nearest(hidden_states, self.embed)


class FastEncodecResidual(FastResidual):
    """Encodec's levels in one pass."""

    holder = "codebook"

    def encode(self, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:  # [B, D, T] -> [Q, B, T]
        """As the peer's."""
        done = self._at_once(embeddings, self.get_num_quantizers_for_bandwidth(bandwidth))
        if done is None:
            theirs: Any = super()
            return theirs.encode(embeddings, bandwidth)
        return done[1]


class FastXcodecResidual(FastEncodecResidual):
    """Xcodec's, which keeps its levels under another name."""

    stack = "quantizers"


class FastMimiResidual(FastResidual):
    """Mimi's, which may project what comes in."""

    holder = "codebook"

    def encode(self, embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:  # [B, D, T] -> [Q, B, T]
        """As the peer's."""
        x = embeddings if self.input_proj is None else self.input_proj(embeddings)
        done = self._at_once(x, self.num_quantizers if num_quantizers is None else num_quantizers)
        if done is None:
            theirs: Any = super()
            return theirs.encode(embeddings, num_quantizers)
        return done[1]


class FastVQVAEQuantizer(PatchedModule):
    """Chameleon, Janus: the loss with beta on the codebook's side, as taming-transformers' legacy one."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, D, H, W]
        """As the peer's."""
        quantized, loss, indices = image_quantize(
            hidden_state.permute(0, 2, 3, 1), self.embedding.weight, commitment_weight=1.0, codebook_weight=self.beta
        )
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, indices.flatten()


class FastGlmImageQuantizer(PatchedModule):
    """GLM-Image: both sides normalised, and the normalised code comes out."""

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, D, H, W]
        """As the peer's, looked up by angle."""
        z = hidden_state.permute(0, 2, 3, 1)
        indices = nearest(z, self.embedding.weight, "cosine")
        z = F.normalize(z, p=2, dim=-1)
        chosen = F.normalize(F.embedding(indices, self.embedding.weight), p=2, dim=-1)
        loss = torch.mean((chosen.detach() - z) ** 2) + self.beta * torch.mean((chosen - z.detach()) ** 2)
        quantized = z + (chosen - z).detach()
        return quantized.permute(0, 3, 1, 2).contiguous(), loss, indices.flatten()


class FastEmu3Quantizer(PatchedModule):
    """Emu3: indices alone."""

    def forward(self, hidden_state: Tensor) -> Tensor:  # [B, T, D, H, W] -> [B, T, H, W]
        return nearest(hidden_state.permute(0, 1, 3, 4, 2), self.embedding.weight)


# What the classes read beyond the shapes that ``_target`` is given.
READ = {
    FastMimiCodebook: ("embed",),
    FastEncodecResidual: ("get_num_quantizers_for_bandwidth",),
    FastXcodecResidual: ("get_num_quantizers_for_bandwidth",),
    FastMimiResidual: ("input_proj",),
}


def _target(model: str, name: str, fast: type[PatchedModule], method: str, **attributes: str) -> PatchTarget:
    module = f"transformers.models.{model}.modeling_{model}"
    return PatchTarget(
        peer="transformers",
        name=name,
        modules=module.replace(".", r"\."),
        fast=fast,
        replaced_methods=(method,),
        attributes=READ.get(fast, ()),
        reject=require(**attributes),
        importable=(module,),
        distribution="transformers",
        tested="5.23",
    )


EMBEDDING = {"embedding__weight": "2"}
TARGETS = (
    *(
        _target(model, f"{prefix}EuclideanCodebook", FastEuclideanCodebook, "quantize", embed="2")
        for model, prefix in (
            ("encodec", "Encodec"),
            ("xcodec", "Xcodec"),
            ("higgs_audio_v2_tokenizer", "HiggsAudioV2Tokenizer"),
        )
    ),
    _target("mimi", "MimiEuclideanCodebook", FastMimiCodebook, "quantize", embed_sum="2", cluster_usage="1"),
    _target("encodec", "EncodecResidualVectorQuantizer", FastEncodecResidual, "encode", layers="", codebook_size=""),
    _target(
        "xcodec", "XcodecResidualVectorQuantization", FastXcodecResidual, "encode", quantizers="", codebook_size=""
    ),
    _target("mimi", "MimiResidualVectorQuantizer", FastMimiResidual, "encode", layers="", num_quantizers=""),
    _target("dac", "DacVectorQuantize", FastDacVectorQuantize, "decode_latents", codebook__weight="2"),
    _target(
        "dac", "DacResidualVectorQuantizer", FastDacResidualVectorQuantizer, "forward", quantizers="", n_codebooks=""
    ),
    *(
        _target(model, f"{prefix}VQVAEVectorQuantizer", fast, "forward", **EMBEDDING, **extra)
        for model, prefix, fast, extra in (
            ("chameleon", "Chameleon", FastVQVAEQuantizer, {"beta": ""}),
            ("janus", "Janus", FastVQVAEQuantizer, {"beta": ""}),
            ("glm_image", "GlmImage", FastGlmImageQuantizer, {"beta": ""}),
            ("emu3", "Emu3", FastEmu3Quantizer, {}),
        )
    ),
)

__getattr__ = subclasses_of(
    __name__,
    {
        **{target.name: target.importable[0] for target in TARGETS},
        "MimiSplitResidualVectorQuantizer": "transformers.models.mimi.modeling_mimi",
    },
    TARGETS,
)
