"""Operations over several processes: sums of statistics in one message, gathering of vectors, sharded codebooks.

All functions work on any backend of ``torch.distributed`` (gloo, NCCL), and for one process without it. Ranks may hold
batches of different sizes or empty ones: the size of a message does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq._checks import check_codebook, check_option
from fastvq.ops import nearest
from fastvq.ops.nearest import METRICS
from fastvq.ops.nearest.common import norms

__all__ = ["all_reduce_packed", "check_same", "gather_rows", "nearest_sharded", "rank", "world_size"]

OP = "fastvq.distributed.nearest_sharded"
# A count is sent as two float32 numbers, count // BASE and count % BASE. For counts that sum to less than 2^36, on up
# to 4096 ranks, both sums stay below 2^24, so float32 holds them exactly.
BASE = 1 << 12


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in ``group`` (None: all); 1 where torch.distributed is not initialized."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Number of this process in ``group`` (None: all); 0 where torch.distributed is not initialized."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def all_reduce_packed(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Sums float and int64 tensors over ranks, by one all-reduce of one buffer. One process gets its tensors back.

    The buffer is float32 (float64 if a tensor is); int64 tensors must hold counts, 0 ... 2^36, and stay exact. All
    ranks must pass tensors of the same shapes and dtypes in the same order.
    """
    if world_size(group) == 1 or not tensors:
        return list(tensors)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    parts = []
    for t in tensors:
        if t.dtype == torch.int64:
            parts += [(t // BASE).reshape(-1).to(dtype), (t % BASE).reshape(-1).to(dtype)]
        else:
            parts.append(t.reshape(-1).to(dtype))
    buffer = torch.cat(parts)
    dist.all_reduce(buffer, group=group)
    sums, start = [], 0
    for t in tensors:
        n = t.numel()
        if t.dtype == torch.int64:
            high, low = buffer[start : start + n].long(), buffer[start + n : start + 2 * n].long()
            sums.append((high * BASE + low).view(t.shape))
            start += 2 * n
        else:
            sums.append(buffer[start : start + n].view(t.shape).to(t.dtype))
            start += n
    return sums


def gather_rows(
    rows: Tensor,  # [n, D], n may differ between ranks
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # [sum of n, D]
    """The vectors of all ranks, in the order of the ranks, on every rank."""
    world = world_size(group)
    if world == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device), group=group)
    longest = max(int(s) for s in sizes)
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, sizes, strict=True)])


def check_same(
    owner: str,  # name of the module that holds the tensors, for the message
    tensors: Mapping[str, Tensor],  # float32, the same names and shapes on every rank
    group: dist.ProcessGroup | None = None,
) -> None:
    """Compares checksums of tensors over ranks. Every rank must call it. It waits for the device.

    ``FASTVQ_CHECK=2`` makes every quantizer compare its codebook before each synchronised update.

    Raises:
        RuntimeError: on every rank, if the bits of a tensor differ between ranks; the message names the tensor and the
            ranks.
    """
    world = world_size(group)
    if world == 1:
        return
    own = torch.stack([_checksum(t) for t in tensors.values()])
    gathered = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(gathered, own, group=group)
    for name, of_ranks in zip(tensors, torch.stack(gathered, dim=1).tolist(), strict=True):
        others = [r for r, checksum in enumerate(of_ranks) if checksum != of_ranks[0]]
        if others:
            raise RuntimeError(
                f"{owner}: {name} must be the same on every rank, but rank{'s' if len(others) > 1 else ''} "
                f"{', '.join(map(str, others))} of the group {'differ' if len(others) > 1 else 'differs'} from rank 0; "
                "load the same state_dict, or construct the module with the same seed, on every rank"
            )


def _checksum(t: Tensor) -> Tensor:  # [] int64
    """A sum of the bits weighted by position, so that it depends on the order of rows."""
    bits = t.detach().float().contiguous().view(torch.int32).reshape(-1).long()
    weight = torch.arange(1, 2 * bits.numel(), 2, device=t.device) * 0x9E3779B1
    return (bits * weight).sum()


def nearest_sharded(
    x: Tensor,  # [..., D], the same on every rank
    codebook: Tensor,  # [K_rank, D], this rank's codes
    *,
    metric: Literal["euclidean", "cosine", "dot"] = "euclidean",
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # [...] int64
    """``fastvq.ops.nearest`` with the codebook cut over ranks: rank 0 holds the first codes, and so on.

    Every rank looks x up among its own codes and scores its winner by the definition, in float64. One all-reduce finds
    the smallest score, another the lowest index with that score. So every rank gets the indices into the whole codebook
    that one process would get, ties included. Shards may have different sizes; x must be the same on every rank.

    Raises:
        ValueError, TypeError: as ``nearest``.
    """
    check_codebook(OP, x, codebook)
    check_option(OP, "metric", metric, METRICS)
    local = nearest(x, codebook, metric=metric, backend=backend)
    world, own_rank = world_size(group), rank(group)
    if world == 1:
        return local
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(codebook)], device=x.device), group=group)
    offset = sum(int(s) for s in sizes[:own_rank])
    score = _scores_of(x.reshape(-1, x.shape[-1]), codebook, local.reshape(-1), metric)
    smallest = score.clone()
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    index = torch.where(score == smallest, local.reshape(-1) + offset, torch.iinfo(torch.int64).max)
    dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    return index.view(local.shape)


def _scores_of(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    """The score d_k of the definition, for one code a vector; infinity where the code may not be chosen."""
    wide = codebook.double()
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for d in range(x.shape[1]):
        a, c = x[:, d].double(), wide[:, d][indices]
        total += (a - c) * (a - c) if metric == "euclidean" else a * c
    if metric != "euclidean":
        total = -total
    if metric == "cosine":
        norm = norms(wide)[indices]
        total = torch.where(norm == 0, torch.inf, total / norm)
    usable = codebook.isfinite().all(dim=1)[indices] & x.isfinite().all(dim=1) & ~total.isnan()
    return torch.where(usable, total, torch.inf)
