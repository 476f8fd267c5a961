"""A gated PixelCNN over id maps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvq._checks import check_dense, check_float, check_indices, check_integer, check_same_device
from fastvq.models import sampling
from fastvq.nn import GatedMaskedConv2d
from fastvq.nn.masked_conv import MaskName
from fastvq.ops import PixelCNNState, pixelcnn_start
from fastvq.ops._library import serialisable

__all__ = ["PixelCNN", "PixelCNNLoss"]


@serialisable("models.PixelCNNLoss")
class PixelCNNLoss(NamedTuple):
    """Result of ``PixelCNN.loss``.

    Attributes:
        nats: [] mean negative log-likelihood of a position; call backward on it.
        bits: [] the same in bits, detached.
    """

    nats: Tensor
    bits: Tensor


class _Layer(nn.Module):
    def __init__(self, channels: int, kernel_size: int, first: bool, last: bool) -> None:
        super().__init__()
        above: MaskName = "vertical-A" if first else "vertical-B"
        left: MaskName = "horizontal-A" if first else "horizontal-B"
        self.first, self.last = first, last
        self.vertical = GatedMaskedConv2d(channels, channels, kernel_size, mask=above)
        self.link = nn.Conv2d(channels, 2 * channels, 1)
        self.horizontal = GatedMaskedConv2d(channels, channels, (1, kernel_size), mask=left)
        self.out = nn.Conv2d(channels, channels if last else 2 * channels, 1)

    def forward(
        self,
        v: Tensor,  # [B, C, H, W]
        h: Tensor,  # [B, C, H, W]
        condition: Tensor | None,  # [B, 4C] or [B, 4C, H, W]
    ) -> tuple[Tensor, Tensor, Tensor]:
        vertical, horizontal = (None, None) if condition is None else condition.chunk(2, dim=1)
        gated = self.vertical(v, vertical)
        v = gated if self.first else v + gated
        link = self.link(v)
        if horizontal is not None:
            link = link + (horizontal if horizontal.dim() == 4 else horizontal[:, :, None, None])
        out = self.out(self.horizontal(h, link))
        if self.last:
            return v, h, out
        residual, skip = out.chunk(2, dim=1)
        return v, residual if self.first else h + residual, skip


class PixelCNN(nn.Module):
    """Gated PixelCNN over maps of ids (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN
    Decoders").

    Position (i, j) depends on exactly the positions before it in raster order. A vertical stack sees all columns of the
    rows above. It feeds a horizontal stack, which sees the positions to the left in the row; so there is no blind spot.
    ``fastvq.ops.pixelcnn_start`` gives the equations. The receptive field reaches ``reach`` rows up and as many columns
    to either side.

    Args:
        n_codes: how many ids there are. They are embedded, never one-hot.
        channels: width of both stacks.
        n_layers: layers, each with a vertical and a horizontal gated convolution.
        n_classes: for conditioning on a label per image.
        condition_channels: for conditioning on a feature map [B, condition_channels, h / s, w / s] for whole s, as the
            decoded or embedded map of another level.
        kernel_size, first_kernel_size: odd.

    Raises:
        ValueError: sizes below one, even kernel sizes.
    """

    def __init__(
        self,
        n_codes: int,
        channels: int,
        n_layers: int,
        n_classes: int | None = None,
        condition_channels: int | None = None,
        *,
        kernel_size: int = 3,
        first_kernel_size: int = 5,
    ) -> None:
        super().__init__()
        sizes = {
            "n_codes": n_codes,
            "channels": channels,
            "n_layers": n_layers,
            "kernel_size": kernel_size,
            "first_kernel_size": first_kernel_size,
        }
        optional = {"n_classes": n_classes, "condition_channels": condition_channels}
        sizes |= {name: value for name, value in optional.items() if value is not None}
        for name, value in sizes.items():
            check_integer("fastvq.models.PixelCNN", name, value)
            if value < 1:
                raise ValueError(f"fastvq.models.PixelCNN: {name} must be >= 1, got {value}")
        self.n_codes, self.channels, self.n_classes, self.condition_channels = (
            n_codes,
            channels,
            n_classes,
            condition_channels,
        )
        self.kernel_sizes = (first_kernel_size, *[kernel_size] * (n_layers - 1))
        self.embedding = nn.Embedding(n_codes, channels)
        self.layers = nn.ModuleList(
            _Layer(channels, k, first=i == 0, last=i == n_layers - 1) for i, k in enumerate(self.kernel_sizes)
        )
        self.head = nn.ModuleList([nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, n_codes, 1)])
        wide = n_layers * 4 * channels
        self.label_condition = None if n_classes is None else nn.Embedding(n_classes, wide)
        self.map_condition = None if condition_channels is None else nn.Conv2d(condition_channels, wide, 1)

    @property
    def reach(self) -> int:
        return sum(k // 2 for k in self.kernel_sizes)

    def conditions(
        self,
        shape: tuple[int, int, int],  # B, h, w
        labels: Tensor | None,  # [B] int64
        condition: Tensor | None,  # [B, condition_channels, h / s, w / s]
    ) -> Tensor | None:  # [B, layers, 4C] or [B, layers, 4C, h / s, w / s]
        """The term added to the pre-activations of every layer: vertical a and b, horizontal a and b."""
        name = "fastvq.models.PixelCNN"
        batch, h, w = shape
        for given, argument, module, parameter in (
            (labels, "labels", self.label_condition, "n_classes"),
            (condition, "condition", self.map_condition, "condition_channels"),
        ):
            if given is None and module is not None:
                raise ValueError(f"{name}: {argument} must be given, as the model was made with {parameter}; pass it")
            if given is not None and module is None:
                raise ValueError(f"{name}: {argument} must be None, as the model was made without {parameter}")
            if isinstance(given, Tensor):
                check_same_device(name, "the model", self.embedding.weight, argument, given)
        total = None
        if labels is not None and self.label_condition is not None:
            assert self.n_classes is not None
            sampling.check_labels(name, labels, batch, self.n_classes)
            total = self.label_condition(labels).unflatten(1, (len(self.layers), -1))
        if condition is not None and self.map_condition is not None:
            check_float(name, "condition", condition)
            fits = condition.dim() == 4 and list(condition.shape[:2]) == [batch, self.condition_channels]
            if not fits or 0 in condition.shape[2:] or h % condition.shape[2] or w % condition.shape[3]:
                raise ValueError(
                    f"{name}: condition must be [{batch}, {self.condition_channels}, h, w] with h dividing {h} and w "
                    f"dividing {w}, got {list(condition.shape)}; resize it to a whole fraction of the id map"
                )
            maps = self.map_condition(condition).unflatten(1, (len(self.layers), -1))
            total = maps if total is None else maps + total[..., None, None]
        return total

    def forward(
        self,
        ids: Tensor,  # [B, h, w] int64
        labels: Tensor | None = None,  # [B] int64
        condition: Tensor | None = None,  # [B, condition_channels, h / s, w / s]
    ) -> Tensor:  # [B, n_codes, h, w]
        """Logits of every position, from the ids before it in raster order.

        Raises:
            ValueError: ids that are not an int64 map or not codes, labels that are not classes (ranges are checked on a
                CPU, elsewhere under FASTVQ_CHECK=1), a condition that is missing, not expected, or does not fit.
            TypeError: ids or labels that are not tensors.
        """
        if not isinstance(ids, Tensor):
            raise TypeError(f"fastvq.models.PixelCNN: ids must be int64 [B, h, w], got {type(ids).__name__}")
        check_dense("fastvq.models.PixelCNN", "ids", ids)
        if ids.dim() != 3 or ids.dtype != torch.int64 or 0 in ids.shape[1:]:
            raise ValueError(
                f"fastvq.models.PixelCNN: ids must be int64 [B, h, w], got {ids.dtype} {list(ids.shape)}; use .long()"
            )
        check_indices("fastvq.models.PixelCNN", "ids", ids, 0, self.n_codes)
        batch, height, width = ids.shape
        total = self.conditions((batch, height, width), labels, condition)
        # Embedded ids, moved to [B, C, h, w], are channels-last in memory; all layers keep that.
        v = h = self.embedding(ids).movedim(-1, 1)
        skip: Tensor | None = None
        for i, layer in enumerate(self.layers):
            added = None if total is None else total[:, i]
            if added is not None and added.dim() == 4:
                added = F.interpolate(added, size=(height, width), mode="nearest")
            v, h, out = layer(v, h, added)
            skip = out if skip is None else skip + out
        assert skip is not None  # n_layers >= 1
        return self.head[1](F.relu(self.head[0](F.relu(skip))))

    def loss(
        self,
        ids: Tensor,  # [B, h, w] int64
        labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> PixelCNNLoss:
        """Mean negative log-likelihood of a position, -log p(id | ids before it), in nats and in bits; float32."""
        nats = F.cross_entropy(self(ids, labels, condition).float(), ids)
        return PixelCNNLoss(nats, nats.detach() / math.log(2))

    def sampler_state(
        self,
        shape: tuple[int, int, int],  # B, h, w
        labels: Tensor | None,  # [B] int64
        condition: Tensor | None,  # [B, condition_channels, h / s, w / s]
    ) -> PixelCNNState:
        """The state of the cached sampler: packed weights, the condition of every layer, an empty cache."""
        modules = [m for layer in self.layers for m in (layer.vertical, layer.link, layer.horizontal, layer.out)]
        weights = [self.embedding.weight, *(p for m in (*modules, *self.head) for p in (m.weight, m.bias))]
        total = self.conditions(shape, labels, condition)
        if total is not None:
            if total.dim() == 3:
                total = total[..., None, None]
            total = total.permute(1, 0, 3, 4, 2)
        return pixelcnn_start(weights, self.kernel_sizes, shape, condition=total)

    def sample(
        self,
        shape: tuple[int, int, int],  # B, h, w
        labels: Tensor | None = None,  # [B] int64
        condition: Tensor | None = None,  # [B, condition_channels, h / s, w / s]
        known: Tensor | None = None,  # [B, h, w] int64
        keep: Tensor | None = None,  # [B, h, w] bool
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        cached: bool = True,
        progress: bool | sampling.Progress = False,
    ) -> Tensor:  # [B, h, w] int64
        """Samples id maps position by position, in raster order.

        Uniforms [B, h, w] are drawn first, in float64, one for each position. The inverse CDF turns a uniform u into an
        id: the first k whose cumulative probability exceeds u. ``cached=True`` computes each position once;
        ``cached=False`` runs the whole network for every position. Both give the same samples, unless a uniform lies
        within rounding of a CDF edge. A kept position does not change the uniforms of the others. Memory does not grow
        with the number of sampled positions. Runs in the parameters' dtype, under autocast too.

        Args:
            known, keep: where ``keep`` is True, the id of ``known`` stays. The other positions are sampled given all
                ids before them. ``keep=None`` with ``known`` keeps nothing.
            temperature: divides the logits; 0 takes the likeliest id.
            top_k: only the k likeliest ids (ties: lower ids first).
            top_p: only the likeliest ids whose probabilities, largest first, reach p (at least one), after ``top_k``.
            generator: on the model's device.
            progress: True shows a bar (needs rich). A function is called with (positions done, positions in all); an
                exception that it raises ends the drawing.

        Raises:
            ValueError: sizes, ranges or conditions that do not fit.
        """
        return sampling.sample(
            self,
            shape,
            labels,
            condition,
            known,
            keep,
            sampling.Choice(temperature, top_k, top_p),
            generator,
            cached,
            progress,
        )
