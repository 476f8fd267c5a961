"""Where elements lie in memory: strides, gaps, shared and overlapping storage."""

from collections.abc import Callable

import torch
from torch import Tensor


def _in_gaps(t: Tensor, step: int, before: int, after: int) -> Tensor:
    """The same elements within a larger tensor, the rest of it NaN (True, -1): nothing may read or write that."""
    fill = float("nan") if t.is_floating_point() else True if t.dtype == torch.bool else -1
    size = t.shape[-1] * step + before + after
    out = torch.full((*t.shape[:-1], size), fill, dtype=t.dtype)[..., before : size - after : step]
    return out.copy_(t)


def _overlapping(t: Tensor) -> Tensor:
    """Every stride 1: vectors that begin one element apart share all their elements but one."""
    return t.contiguous().as_strided(t.shape, (*[1] * t.dim(),)) if t.numel() else t


# Layouts that keep every value.
KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "sliced": lambda t: _in_gaps(t, 2, 1, 0),
    "padded": lambda t: _in_gaps(t, 1, 2, 1),
    "misaligned": lambda t: _in_gaps(t.reshape(1, -1), 1, 3, 4)[0].view(t.shape),
    "first dimension last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
}
# Those that make several elements one.
SHARING: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded rows": lambda t: t[:1].expand_as(t),
    "expanded elements": lambda t: t[..., :1].expand_as(t),
    "overlapping": _overlapping,
}
LAYOUTS = KEEPING | SHARING
