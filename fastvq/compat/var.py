"""VAR: ``VectorQuantizer2``, the quantizer of residuals from coarse to fine, in whole as far as a VQ-VAE needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastvq._options import Metric
from fastvq.compat._lookup import nearest
from fastvq.compat._target import PatchedModule, PatchTarget, require

__all__ = ["TARGETS", "FastVectorQuantizer2", "VectorQuantizer2"]


class FastVectorQuantizer2(PatchedModule):
    """The lookup stands in ``forward`` and in ``f_to_idxBl_or_fhat``; both walk the same scales here."""

    def forward(
        self, f_BChw: Tensor, ret_usages: bool = False
    ) -> tuple[Tensor, list[float] | None, Tensor]:  # f [B, C, H, W]
        """As the peer's: the sum of all scales with a straight-through gradient, usages in percent, the loss."""
        f = f_BChw.float()
        fixed = f.detach()
        sizes = [(n, n) for n in self.v_patch_nums]
        f_hat, loss = torch.zeros_like(fixed), fixed.new_zeros(())
        with torch.autocast("cuda", enabled=False):
            for scale, (indices, refined) in enumerate(self._scales(f, sizes)):
                f_hat = f_hat + refined
                loss = loss + F.mse_loss(f_hat.detach(), f) * self.beta + F.mse_loss(f_hat, fixed)
                if self.training and _world_size() > 0:
                    self._record(scale, indices)
            f_hat = (f_hat.detach() - fixed) + f
        usages = None
        if ret_usages:
            margin = max(1, _world_size()) * (f.numel() / f.shape[1]) / self.vocab_size * 0.08
            usages = [(hits >= margin).float().mean().item() * 100 for hits in self.ema_vocab_hit_SV]
        return f_hat, usages, loss / len(sizes)

    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int | tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """As the peer's: for each scale the sum so far [B, C, H, W], or the indices [B, h w]."""
        sizes = [(n, n) if isinstance(n, int) else (n[0], n[1]) for n in (v_patch_nums or self.v_patch_nums)]
        if sizes[-1] != tuple(f_BChw.shape[2:]):
            raise ValueError(
                f"f_to_idxBl_or_fhat: the last scale must be the map's size {tuple(f_BChw.shape[2:])}, got {sizes[-1]}"
            )
        f_hat, result = torch.zeros_like(f_BChw.detach()), []
        for scale, (indices, refined) in enumerate(self._scales(f_BChw, sizes)):
            if 0 <= self.prog_si < scale:
                break
            f_hat = f_hat + refined
            result.append(f_hat if to_fhat else indices.flatten(1))
        return result

    def _scales(self, f: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices [B, h, w] of each scale, and its codes enlarged and refined [B, C, H, W]."""
        rest, last = f.detach(), len(sizes) - 1
        metric: Metric = "cosine" if self.using_znorm else "euclidean"
        for scale, size in enumerate(sizes):
            small = rest if scale == last else F.interpolate(rest, size=size, mode="area")
            indices = nearest(small.permute(0, 2, 3, 1), self.embedding.weight, metric)
            codes = self.embedding(indices).permute(0, 3, 1, 2)
            if scale != last:
                codes = F.interpolate(codes, size=tuple(f.shape[2:]), mode="bicubic")
            refined = self.quant_resi[scale / last](codes.contiguous())
            rest = rest - refined.detach()
            yield indices, refined

    def _record(self, scale: int, indices: Tensor) -> None:
        """A moving average of how often each code was chosen on all ranks: plain at first, then slower and slower."""
        hits = indices.flatten().bincount(minlength=self.vocab_size).float()
        distributed.all_reduce(hits)
        keep = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
        self.ema_vocab_hit_SV[scale].mul_(keep).add_(hits.mul(1 - keep))
        self.record_hit += 1


class VectorQuantizer2(FastVectorQuantizer2):
    """``VectorQuantizer2(vocab_size, Cvae, using_znorm, ...)`` with the peer's constructor, state and forward.

    ``f_to_idxBl_or_fhat`` is here too. What only VAR's transformer calls stays in the peer's class; patch that for it.
    """

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ) -> None:
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.v_patch_nums, self.quant_resi_ratio = tuple(v_patch_nums), quant_resi
        n_refinements = share_quant_resi or default_qresi_counts or len(self.v_patch_nums)
        self.quant_resi = Refinements(Cvae, quant_resi, n_refinements, shared=share_quant_resi != 0)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.v_patch_nums), vocab_size))
        self.record_hit, self.prog_si = 0, -1
        self.embedding = nn.Embedding(vocab_size, Cvae)


class Refinement(nn.Conv2d):
    """``(1 - r) x + r conv(x)``."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__(dim, dim, kernel_size=3, padding=1)
        self.resi_ratio = abs(ratio)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return x * (1 - self.resi_ratio) + super().forward(x) * self.resi_ratio


class Refinements(nn.Module):
    """One refinement, some that neighbouring scales share, or one a scale; keys as in the peer's checkpoints."""

    def __init__(self, dim: int, ratio: float, n: int, *, shared: bool) -> None:
        super().__init__()
        made = [Refinement(dim, ratio) if abs(ratio) > 1e-6 else nn.Identity() for _ in range(n)]
        if shared and n == 1:
            self.qresi = made[0]
        elif shared:
            self.qresi_ls = nn.ModuleList(made)
        else:
            for i, one in enumerate(made):
                self.add_module(str(i), one)
        # Names, not modules: a copy of this module must find its own.
        self._all = tuple(name for name, one in self.named_modules() if one in made)
        edge = 1 / (3 * n) if n == 4 else 1 / (2 * n)
        self._ticks = torch.linspace(edge, 1 - edge, n, dtype=torch.float64)

    def __getitem__(self, at: float) -> nn.Module:
        """The one whose place is nearest to ``at`` in [0, 1]."""
        return self.get_submodule(self._all[int((self._ticks - at).abs().argmin())])


def _world_size() -> int:
    """0 without torch.distributed."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 0


TARGETS = (
    PatchTarget(
        peer="var",
        name="VectorQuantizer2",
        modules=r"(.*\.)?models\.quant",
        fast=FastVectorQuantizer2,
        replaced_methods=("forward", "f_to_idxBl_or_fhat"),
        attributes=("beta", "prog_si", "record_hit", "vocab_size"),
        reject=require(embedding__weight="2", ema_vocab_hit_SV="2", using_znorm="", v_patch_nums="", quant_resi=""),
    ),
)
