"""The state of a learned codebook: its buffers, their dtype (always float32), and whether k-means must start them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvq._checks import check_float, check_same_device
from fastvq._options import Metric

__all__ = ["CodebookState"]

UNIT_TOLERANCE = 1e-6  # a float32 vector counts as unit if its length differs from 1 by less

# Buffers that stay float32 when the module is cast. Averages in 16 bits would stop moving. Flags are float32 too, as
# torch's AveragedModel can average buffers only if all of them are floating-point.
FLOAT32_BUFFERS = ("codebook", "embed_sum", "cluster_size", "initialised", "frozen_mask")


class CodebookState(nn.Module):
    """Buffers [*lead, K, D] of a quantizer, and all methods that set them. A base class, not a module to use alone.

    The buffers are the whole saved state. Statistics of the last step, pending statistics for ``update_codebooks`` and
    running totals are plain tensors, not buffers. So no loader can leave them undefined, and wrappers that broadcast or
    average buffers do not touch them.
    """

    codebook: Tensor
    embed_sum: Tensor
    cluster_size: Tensor
    initialised: Tensor
    frozen_mask: Tensor | None

    def __init__(
        self,
        owner: str,
        lead: tuple[int, ...],
        n_codes: int,
        code_dim: int,
        *,
        metric: Metric,
        learnable: bool,
        kmeans_init: bool,
        dead_code_threshold: float | None,
        update: str,
    ) -> None:
        super().__init__()
        self.owner, self.lead, self.n_codes, self.code_dim, self.metric = owner, lead, n_codes, code_dim, metric
        self.learnable, self.kmeans_init = learnable, kmeans_init
        self.dead_code_threshold, self.update = dead_code_threshold, update
        self.frozen = False
        self._module_dtype = torch.get_default_dtype()
        shape = (*lead, n_codes, code_dim)
        codebook = torch.empty(shape, dtype=torch.float32)
        if learnable:
            self.codebook = nn.Parameter(codebook.to(self._module_dtype))
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("embed_sum", torch.empty_like(codebook))
        self.register_buffer("cluster_size", torch.empty(shape[:-1], dtype=torch.float32))
        self.register_buffer("initialised", torch.empty((), dtype=torch.float32))
        self.register_buffer("frozen_mask", None)
        self._before_update: Tensor | None = None
        self._total_counts: Tensor | None = None
        self._forget_last_read()
        self._clear_statistics()
        self.reset_parameters()

    # ---- setting the state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Makes a new random start, like the constructor. Defines every buffer after ``to_empty``."""
        start = torch.randn(self.codebook.shape, dtype=torch.float32, device=self.codebook.device)
        if self.metric == "cosine":
            start = nn.functional.normalize(start, dim=-1)
        self._restore_float32()
        self._write(start, torch.full_like(self.cluster_size, self._start_size()))
        self.initialised.fill_(not self.kmeans_init)
        self._forget_last_read()

    @torch.no_grad()
    def set_codebook(
        self,
        codes: Tensor,  # [K, code_dim], or [lead, K, code_dim]: the shape of ``codebook``
        sizes: Tensor | None = None,  # [K] or [lead, K]: the shape of ``cluster_size``
    ) -> None:
        """Sets the codebook to ``codes``. Learning continues from there, without a k-means start.

        ``sizes`` is the weight of each code in the moving average: the number of vectors that it gets in a step. A
        code of size n, given m vectors in the first step, moves by the share (1 - decay) m / (decay n + (1 - decay) m)
        towards their mean. Without ``sizes`` every code has the size of a new module: 1, or the dead-code threshold
        if that is larger. For cosine the codes are scaled to unit length. Pending statistics are dropped. With
        several processes every rank must set the same codes.

        Raises:
            ValueError: another shape or device, codes that are not finite, sizes that are not positive and finite.
            TypeError: tensors that are not floating-point.
        """
        name = f"{self.owner}.set_codebook"
        self._restore_float32()
        check_float(name, "codes", codes)
        if codes.shape != self.codebook.shape:
            raise ValueError(f"{name}: codes must be {list(self.codebook.shape)}, got {list(codes.shape)}")
        check_same_device(name, "codebook", self.codebook, "codes", codes)
        if not bool(codes.isfinite().all()):
            raise ValueError(f"{name}: codes must be finite, got NaN or infinity; leave such codes out")
        if sizes is None:
            sizes = torch.full_like(self.cluster_size, self._start_size())
        check_float(name, "sizes", sizes)
        if sizes.shape != self.cluster_size.shape:
            raise ValueError(f"{name}: sizes must be {list(self.cluster_size.shape)}, got {list(sizes.shape)}")
        check_same_device(name, "codebook", self.codebook, "sizes", sizes)
        if not bool(((sizes > 0) & sizes.isfinite()).all()):
            raise ValueError(f"{name}: sizes must be positive and finite; a code that no vector chose can have size 1")
        codes = codes.float()
        if self.metric == "cosine":
            # Codes that already have unit length to rounding, like those of another module, keep all bits.
            is_unit = (codes.norm(dim=-1, keepdim=True) - 1).abs() < UNIT_TOLERANCE
            codes = torch.where(is_unit, codes, nn.functional.normalize(codes, dim=-1))
        self._write(codes, sizes.float())
        self.initialised.fill_(1)
        self._forget_last_read()

    def freeze(self, frozen: bool = True) -> None:
        """Stops all learning, also in training mode: no update, no k-means start, no gradient to a parameter."""
        self.frozen = frozen
        if self.learnable:
            self.codebook.requires_grad_(not frozen)

    def freeze_codes(
        self,
        mask: Tensor | None,  # bool, [K] or [lead, K]: the shape of ``cluster_size``; None freezes no code
    ) -> None:
        """Freezes the codes where ``mask`` is True, while the others learn.

        Lookups still choose frozen codes. No update, replacement or k-means start changes them, and a learnable
        codebook gets a zero gradient there (an optimizer with momentum or weight decay can still move a parameter).
        The mask is saved in the ``state_dict``.

        Raises:
            ValueError: another shape. TypeError: not a bool tensor.
        """
        name = f"{self.owner}.freeze_codes"
        if mask is None:
            self.frozen_mask = None
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: mask must be a bool tensor, got {got}; True freezes a code, convert with .bool()")
        if mask.shape != self.cluster_size.shape:
            raise ValueError(f"{name}: mask must be {list(self.cluster_size.shape)}, got {list(mask.shape)}")
        self.frozen_mask = mask.to(self.cluster_size.device, torch.float32)

    @property
    def frozen_codes(self) -> Tensor | None:
        """The mask of ``freeze_codes``, bool, or None."""
        return None if self.frozen_mask is None else self.frozen_mask != 0

    def _start_size(self) -> float:
        """At least the dead-code threshold, so that the first step does not replace all codes."""
        return max(1.0, self.dead_code_threshold or 0.0)

    def _write(self, codes: Tensor, sizes: Tensor) -> None:
        self.codebook.copy_(codes)
        self.cluster_size.copy_(sizes)
        if not self.learnable:
            self.embed_sum.copy_(codes * sizes[..., None])
        self._clear_statistics()

    # ---- statistics: never saved or loaded

    @property
    def counts(self) -> Tensor:
        """[*lead, K] int64: vectors of each code in the last training step."""
        self._move_statistics()
        return self._counts

    def _clear_statistics(self) -> None:
        """Sets all statistics to those of a new module, on the codebook's device."""
        self._before_update = None
        device = self.codebook.device
        self._counts = torch.zeros(self.cluster_size.shape, dtype=torch.int64, device=device)
        if self.update == "manual":
            self.pending_counts = torch.zeros_like(self._counts)
            self.pending_sums = torch.zeros(self.codebook.shape, dtype=torch.float32, device=device)
            self.pending_rows = torch.full_like(self.pending_sums, torch.nan)
        if self._total_counts is not None:
            self._total_counts = torch.zeros_like(self._counts)

    def _move_statistics(self) -> None:
        """Moves the statistics to the codebook's device; statistics from the meta device become zeros."""
        device = self.codebook.device
        if self._counts.device == device:
            return
        if self._counts.is_meta:
            self._clear_statistics()
            return
        self._before_update = None
        for name in ("_counts", "_total_counts", "pending_counts", "pending_sums", "pending_rows"):
            if isinstance(value := self.__dict__.get(name), Tensor):
                setattr(self, name, value.to(device))

    # ---- keeping the buffers float32

    def _restore_float32(self) -> None:
        """Converts the buffers back to float32 if a loader or a wrapper has assigned another dtype.

        ``from_pretrained(dtype=...)`` assigns tensors, FSDP sets ``.data``: neither goes through ``_apply``.
        """
        buffers = self._buffers
        for name in FLOAT32_BUFFERS:
            held = buffers.get(name)
            if held is None or held.dtype == torch.float32:
                continue
            if held.is_floating_point():
                self._module_dtype = held.dtype
            elif held.dtype != torch.bool:  # ``initialised`` is bool in files of earlier versions
                continue
            if torch.compiler.is_compiling():
                setattr(self, name, held.float())
            else:
                held.data = held.data.float()  # keep the tensor object: DistributedDataParallel has a list of buffers
        self._move_statistics()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodebookState:
        """Moves the buffers to another device, but keeps them float32. A new dtype becomes the dtype of ``decode``."""
        held = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        self._module_dtype = fn(torch.empty(0, dtype=self._module_dtype, device=self.codebook.device)).dtype
        super()._apply(fn, recurse)
        for name, before in held.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self._move_statistics()
        return self

    # ---- copies and loading

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before_update": None, "_last_read": None}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}frozen_mask"
        if name in state_dict and self.frozen_mask is None:
            self.frozen_mask = torch.empty_like(self.cluster_size)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if name in missing_keys:  # saved before ``freeze_codes`` was called: frozen codes of this module stay frozen
            missing_keys.remove(name)
        self._restore_float32()
        self._forget_last_read()
        self._needs_kmeans_start()

    # ---- whether k-means must start the codebook

    def _forget_last_read(self) -> None:
        # (the buffer ``initialised`` when it was last read, its address, its version), and the value read.
        self._last_read: tuple[Tensor, int, int] | None = None
        self._known_initialised = not self.kmeans_init

    def _needs_kmeans_start(self) -> bool:
        """Whether the buffer ``initialised`` is 0. It is read only if it may have changed: a read waits for the device.

        A new tensor or a new address leads to a read. So does a write in place: always on a CPU, where reading is free;
        on other devices until the value read is 1, as DistributedDataParallel writes to all buffers in every step.
        """
        if torch.compiler.is_compiling():
            return not self._known_initialised
        flag = self.initialised
        if flag.is_meta:
            return False
        version = -1 if flag.is_inference() else flag._version
        address = flag.data_ptr()
        if self._last_read is not None:
            buffer, last_address, last_version = self._last_read
            unchanged = version == last_version or (self._known_initialised and flag.device.type != "cpu")
            if buffer is flag and address == last_address and unchanged and version >= 0:
                return not self._known_initialised
        self._known_initialised = bool(flag)
        self._last_read = (flag, address, version)
        return not self._known_initialised
