"""The prior of one level: a PixelCNN over its id map, given a label and the maps of the levels above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvq._checks import check_indices
from fastvq.models.blocks import ResidualBlock
from fastvq.models.checkpoints import Pretrained
from fastvq.models.pixelcnn import PixelCNN

__all__ = ["Prior", "as_priors"]


class Prior(Pretrained):
    """The distribution p(map | maps above, label): its logits, its loss and samples from it.

    .. math::
        p(ids) = \\prod_i p(ids_i | ids_{<i}, above, label), \\quad i \\text{ in raster order}

    Args:
        n_codes: codes of this level's dictionary.
        channels, n_layers: width and depth of the PixelCNN.
        n_classes: labels 0 .. n_classes - 1, or None for none.
        above: one pair (n_codes, factor) for each level above, top first; factor is this map's side over that map's.
        shape: (h, w) of the maps it was trained on, which ``generate`` samples unless it is given a size.
        pixelcnn_options: further arguments of ``PixelCNN``.

    The maps above are embedded, enlarged to the size of the lowest of them, mixed by a convolution and passed through
    two residual blocks. The result is the PixelCNN's condition.
    """

    def __init__(
        self,
        n_codes: int,
        channels: int,
        n_layers: int,
        n_classes: int | None = None,
        *,
        above: Sequence[Sequence[int]] = (),
        shape: Sequence[int] | None = None,
        **pixelcnn_options: Any,
    ) -> None:
        super().__init__()
        if shape is not None and not (len(shape) == 2 and all(isinstance(side, int) and side >= 1 for side in shape)):
            raise ValueError(f"fastvq.models.Prior: shape must be (h, w), two sides of at least 1, got {shape!r}")
        self.config = {
            "n_codes": n_codes,
            "channels": channels,
            "n_layers": n_layers,
            "n_classes": n_classes,
            "above": [list(pair) for pair in above],
            "shape": None if shape is None else list(shape),
            **pixelcnn_options,
        }
        self.n_codes, self.n_classes = n_codes, n_classes
        self.shape = None if shape is None else (shape[0], shape[1])
        self.factors = [
            factor // above[-1][1] for _, factor in above
        ]  # enlarge each map above to the size of the lowest
        self.embeddings = nn.ModuleList(nn.Embedding(k, channels) for k, _ in above)
        self.mix = nn.Conv2d(channels * len(above), channels, 3, padding=1) if above else None
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(2 if above else 0))
        self.pixelcnn = PixelCNN(
            n_codes,
            channels,
            n_layers,
            n_classes=n_classes,
            condition_channels=channels if above else None,
            **pixelcnn_options,
        )

    def forward(
        self,
        ids: Tensor,  # [B, h, w] int64
        labels: Tensor | None = None,  # [B] int64
        above: Sequence[Tensor] = (),  # the maps above, top first
    ) -> Tensor:
        """Logits [B, n_codes, h, w]. The logits at a position depend only on the ids before it."""
        return self.pixelcnn(ids, labels, self._condition(above))

    def loss(
        self, ids: Tensor, labels: Tensor | None = None, above: Sequence[Tensor] = (), *, label_smoothing: float = 0.0
    ) -> Tensor:
        """Mean negative log-likelihood of an id, in nats."""
        return F.cross_entropy(self(ids, labels, above).float(), ids, label_smoothing=label_smoothing)

    @torch.no_grad()
    def log_prob(
        self,
        ids: Tensor,  # [B, h, w]
        labels: Tensor | None = None,
        above: Sequence[Tensor] = (),
    ) -> Tensor:
        """[B, h, w] float32: log p of each id given the ids before it."""
        logits = self(ids, labels, above).float()
        return logits.log_softmax(1).gather(1, ids[:, None])[:, 0]

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, int, int],  # (B, h, w)
        labels: Tensor | None = None,  # [B]
        above: Sequence[Tensor] = (),
        **options: Any,
    ) -> Tensor:
        """ids [B, h, w]; ``options`` are ``PixelCNN.sample``'s: known, keep, temperature, top_k, top_p, generator."""
        return self.pixelcnn.sample(shape, labels, self._condition(above), **options)

    def _condition(self, above: Sequence[Tensor]) -> Tensor | None:
        if len(above) != len(self.embeddings):
            raise ValueError(
                f"fastvq.models.Prior: above must be {len(self.embeddings)} maps, top first, got {len(above)}"
            )
        if self.mix is None:
            return None
        above = [
            check_indices("fastvq.models.Prior", f"above[{level}]", ids, 0, n_codes)
            for level, (ids, (n_codes, _)) in enumerate(zip(above, self.config["above"], strict=True))
        ]
        enlarged = [
            embedding(ids).movedim(-1, 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            for embedding, ids, factor in zip(self.embeddings, above, self.factors, strict=True)
        ]
        x = self.mix(torch.cat(enlarged, 1))
        for block in self.blocks:
            x = block(x)
        return x


class _BarePrior(nn.Module):
    """Wraps a bare ``PixelCNN`` so that it serves as the top level's ``Prior``."""

    shape = None

    def __init__(self, pixelcnn: PixelCNN) -> None:
        super().__init__()
        self.pixelcnn = pixelcnn

    def forward(self, ids: Tensor, labels: Tensor | None = None, above: Sequence[Tensor] = ()) -> Tensor:
        return self.pixelcnn(ids, labels)

    def sample(
        self, shape: tuple[int, int, int], labels: Tensor | None = None, above: Sequence[Tensor] = (), **options: Any
    ) -> Tensor:
        return self.pixelcnn.sample(shape, labels, **options)

    log_prob = Prior.log_prob


def as_priors(op: str, priors: Any, levels: int) -> list[Any]:
    """The list of priors, one a level, top first. ``priors`` is one prior or several; the top level's may be a bare
    ``PixelCNN``.

    Raises:
        ValueError: the number of priors is not the number of levels.
        TypeError: a prior is neither a ``Prior`` nor, at the top, a ``PixelCNN``.
    """
    found = list(priors) if isinstance(priors, (list, tuple, nn.ModuleList)) else [priors]
    if len(found) != levels:
        raise ValueError(f"{op}: priors must be {levels}, one a level, top first, got {len(found)}; train the others")
    for level, prior in enumerate(found):
        if isinstance(prior, PixelCNN) and level == 0:
            found[level] = _BarePrior(prior)
        elif not isinstance(prior, Prior):
            raise TypeError(f"{op}: priors[{level}] must be a fastvq.models.Prior, got {type(prior).__name__}")
    return found
