"""One learning step of several quantizers: sums their statistics over processes, in one message for each group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastvq import _env, distributed

if TYPE_CHECKING:
    from fastvq.nn.codebook import LearnedCodebook

__all__ = ["Group", "QuantizerStatistics", "learn"]

# A quantizer and the statistics of its forwards: sums (None if learnable), counts, rows for dead codes (or None).
QuantizerStatistics = tuple["LearnedCodebook", Tensor | None, Tensor, Tensor | None]


class Group:
    """The processes that learn one codebook: a process group, or all processes. Copies of a module share the object."""

    def __init__(self, owner: str, group: dist.ProcessGroup | None, sync: str) -> None:
        if group is not None and sync == "none":
            raise ValueError(f"{owner}: group must be None with sync='none', which synchronises nothing; leave one out")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            if group is dist.GroupMember.NON_GROUP_MEMBER:
                raise ValueError(
                    f"{owner}: group must be one that this rank belongs to; make the quantizer on ranks of the group "
                    "only, or with sync='none'"
                )
            raise TypeError(
                f"{owner}: group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
            )
        self.group, self.synchronised = group, sync == "auto"

    @property
    def world(self) -> int:
        return distributed.world_size(self.group) if self.synchronised else 1

    @property
    def rank(self) -> int:
        return distributed.rank(self.group) if self.synchronised else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None:
            raise TypeError("fastvq.nn: a process group cannot be pickled; save the module's state_dict() instead")
        return Group, ("fastvq.nn", None, "auto" if self.synchronised else "none")


def learn(statistics: list[QuantizerStatistics]) -> None:
    """One learning step of the quantizers in ``statistics``. All quantizers of one group share one message."""
    messages: list[list[Tensor | None]] = []
    groups: dict[int, tuple[Group, list[int]]] = {}
    for i, (module, sums, counts, rows) in enumerate(statistics):
        group = module.group_of_ranks
        uniforms = None if rows is None else torch.rand(counts.shape, dtype=torch.float32, device=counts.device)
        world = group.world
        if world > 1:
            groups.setdefault(id(group.group), (group, []))[1].append(i)
            if rows is not None and uniforms is not None:
                # Each rank gives the rows of its own slots and zeros elsewhere, and only rank 0 gives uniforms. So the
                # sums over ranks are the same rows and uniforms on every rank.
                slot = torch.arange(module.n_codes, device=rows.device) % world
                rows = torch.where((slot == group.rank)[:, None], rows, 0)
                uniforms = uniforms if group.rank == 0 else torch.zeros_like(uniforms)
        messages.append([sums, counts, rows, uniforms])
    for group, members in groups.values():
        if _env.read("FASTVQ_CHECK") == "2":
            for i in members:
                module = statistics[i][0]
                distributed.check_same(
                    module.owner, {"codebook": module.codebook, "cluster_size": module.cluster_size}, group.group
                )
        sent = [t for i in members for t in messages[i] if t is not None]
        summed = iter(distributed.all_reduce_packed(sent, group.group))
        for i in members:
            messages[i] = [None if t is None else next(summed) for t in messages[i]]
    for (module, *_), (sums, total_counts, rows, uniforms) in zip(statistics, messages, strict=True):
        assert total_counts is not None
        module._learning_step(sums, total_counts, rows, uniforms)
