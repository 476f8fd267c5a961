# mypy: disable-error-code="no-untyped-def, no-untyped-call, has-type"
"""The sampler's choice of an id from logits on a GPU: one launch, a program an image. Torch needs a dozen.

tensor           layout
logits           [B, K]                 any float
uniforms         [B, H, W] float64      one number a position, drawn before the first
mask             [B, H, W] bool         positions to be drawn; others keep their id
ids              [B, H, W] int64        written at the position
position         [1] int64              row * W + column

All arithmetic is float64, and the result is that of ``sample_ids`` in choice.py, except for the order of the sums: a
uniform within a rounding of the step from one id to the next may fall to either. Nothing is sorted. ``top_k`` and
``top_p`` keep every id above some probability and the first few at it. That probability is found bit by bit: a
non-negative float64 is ordered as the integer of its bits.
"""

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvq.backends import tiles
from fastvq.backends.triton import float64_bits
from fastvq.ops.pixelcnn.common import WIDEST_CHOICE

__all__ = ["sample_ids"]

BITS = tl.constexpr(62)  # of a probability, which is at most 1: 0x3FF << 52
# By the number of ids, all of which a program holds at once.
TILES = [
    tiles.Tile(80, 1024, torch.float64, {"num_warps": 4}),
    tiles.Tile(80, 2048, torch.float64, {"num_warps": 8}),
    tiles.Tile(80, WIDEST_CHOICE, torch.float64, {"num_warps": 16}),
]


@triton.jit
def _as_float(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _least_kept(key, weight, wanted):
    """The largest number of bits such that ``weight``, summed over the keys that are not below, reaches ``wanted``."""
    least = tl.zeros([1], tl.int64)
    for i in range(BITS):
        higher = least | (tl.full([1], 1, tl.int64) << (BITS - 1 - i))
        reached = tl.sum(tl.where(key >= higher, weight, 0), axis=0) >= wanted
        least = tl.where(reached, higher, least)
    return least


@triton.jit(do_not_specialize=["n_codes", "n_positions", "inverse_bits", "top_k", "top_p_bits"])
def _choose(
    logits, uniforms, to_draw, ids, position, n_codes, n_positions, inverse_bits, top_k, top_p_bits,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    at = image * n_positions + tl.load(position)
    k = tl.arange(0, BLOCK)
    inside = k < n_codes
    value = tl.load(logits + image * n_codes + k, mask=inside, other=-float("inf")).to(tl.float32)
    if GREEDY:  # the first of the largest, or the first NaN, as torch.argmax
        odd = tl.min(tl.where(value != value, k, BLOCK), axis=0)
        largest = tl.max(tl.where(value != value, -float("inf"), value), axis=0)
        first = tl.min(tl.where(inside & (value == largest), k, BLOCK), axis=0)
        chosen = tl.where(odd < BLOCK, odd, first)
    else:
        value = value.to(tl.float64) * _as_float(inverse_bits)
        # Not divided by their sum: what follows compares them to each other and to their sum alone.
        p = tl.exp(value - tl.max(value, axis=0))
        sane = tl.sum(p, axis=0) > 0  # false where there is a NaN, or an infinity that is not negative
        if TOP_K:
            key = p.to(tl.int64, bitcast=True)
            here = inside.to(tl.int32)
            least = _least_kept(key, here, top_k)
            above = key > least
            # Padding has the key 0 and comes after every id, so it takes no id's place among the first.
            place = tl.cumsum((key == least).to(tl.int32), axis=0)
            p = tl.where(above | ((key == least) & (place <= top_k - tl.sum(above.to(tl.int32), axis=0))), p, 0.0)
        if TOP_P:
            key = p.to(tl.int64, bitcast=True)
            wanted = _as_float(top_p_bits) * tl.sum(p, axis=0)
            least = _least_kept(key, p, wanted)
            above = key > least
            before = tl.sum(tl.where(above, p, 0.0), axis=0)
            place = tl.cumsum((key == least).to(tl.int32), axis=0) - 1
            p = tl.where(above | ((key == least) & (before + place.to(tl.float64) * p < wanted)), p, 0.0)
        sums = tl.cumsum(p, axis=0)
        total = tl.max(sums, axis=0)
        # Just below the total at most: rounding must not pick an id past the last one that has probability.
        below = _as_float(total.to(tl.int64, bitcast=True) - 1)
        threshold = tl.minimum(tl.load(uniforms + at) * total, below)
        # The sums are made in a tree, so they may change by a rounding where the probability is zero.
        first = tl.min(tl.where((sums > threshold) & (p > 0), k, BLOCK), axis=0)
        last = tl.max(tl.where(p > 0, k, -1), axis=0)
        chosen = tl.where(sane, tl.where(first < BLOCK, first, last), n_codes)
    tl.store(ids + at, chosen.to(tl.int64), mask=tl.load(to_draw + at).to(tl.int1))


def sample_ids(
    logits: Tensor,  # [B, K]
    uniforms: Tensor,  # [B, H, W] float64, contiguous
    mask: Tensor,  # [B, H, W] bool, contiguous
    ids: Tensor,  # [B, H, W] int64, contiguous; changed
    position: Tensor,  # [1] int64
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    batch, n_codes = logits.shape
    # A product, as a division of float64 is a call on a GPU, which spills. No number is too small to have an inverse.
    inverse = min(1 / temperature, sys.float_info.max) if temperature else 0.0
    tile = tiles.pick("pixelcnn choice", TILES, logits.device, n_codes, torch.float64)
    _choose[(batch,)](
        logits.contiguous(), uniforms, mask, ids, position, n_codes, ids[0].numel(), float64_bits(inverse),
        min(top_k or n_codes, n_codes), float64_bits(top_p or 1.0), GREEDY=temperature == 0, TOP_K=top_k is not None,
        TOP_P=top_p is not None, BLOCK=triton.next_power_of_2(n_codes), enable_fp_fusion=False, **tile,
    )  # fmt: skip
