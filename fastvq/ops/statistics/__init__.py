"""Codebooks that learn without a gradient: statistics per code, their moving average, replacement of dead codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastvq._checks import (
    check_backend_name,
    check_dense,
    check_float,
    check_generator,
    check_integer,
    check_mask,
    check_number,
    check_option,
    check_same_device,
)
from fastvq.backends import triton as triton_backend
from fastvq.backends.golden import calls as golden_calls
from fastvq.ops._op import CUDA_FIRST, ORDER, Kernel, Op, known_results, register, without_backend
from fastvq.ops._transforms import refuse_tangents
from fastvq.ops.statistics import cpu, cuda, reference
from fastvq.ops.statistics.call import ReplaceCall, StatisticsCall, UpdateCall
from fastvq.ops.statistics.contract import (
    REPLACE,
    SMOOTHINGS,
    STATISTICS,
    UPDATE,
    check_buffers,
    check_candidates,
    check_replace,
    check_statistics,
    check_statistics_call,
    check_update,
    fake_statistics,
)

__all__ = [
    "CODE_STATISTICS",
    "EMA_UPDATE",
    "REPLACE_DEAD_CODES",
    "SMOOTHINGS",
    "code_statistics",
    "ema_update_",
    "replace_dead_codes_",
]

NO_GRADIENT = "what it computes is for an update without gradients"


def code_statistics(
    x: Tensor,  # [..., D], or [H, ..., D] with heads
    indices: Tensor,  # [...] or [H, ...] int64
    n_codes: int,
    *,
    mask: Tensor | None = None,  # [...] or [H, ...] bool
    n_heads: int | None = None,
    deterministic: bool = True,
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> tuple[Tensor, Tensor]:  # [K, D] and [K], or [H, K, D] and [H, K]
    """Sum and number of the vectors that chose each code, in one pass over x.

    .. math:: sums_k = \\sum_{r: index_r = k} x_r, \\qquad counts_k = |\\{r: index_r = k\\}|

    A sum is accumulated in float64 and rounded once, to float32: with n vectors in a code it errs by at most
    ``2^-24 |sum| + (n-1) 2^-53 sum |x_r|`` (to first order), so a code that holds 10^7 vectors is as right as one that
    holds two. On a CPU rows are added in their order: bit-identical whatever the number of threads and the instruction
    set. On a GPU the order is fixed too, but another one: bit-identical from run to run on one kind of card. For
    float64 x the sums are float64 and the last rounding falls away.

    Vectors with index -1, masked ones, and ones that hold NaN or infinity are left out of both.

    Args:
        x: float32, float64, float16 or bfloat16, any strides (a channel-first image moved to channel-last is read in
            place). No gradient flows through the result.
        indices: what ``nearest`` or ``quantize`` returned.
        n_codes: K.
        mask: True marks a real vector.
        n_heads: with heads, their number H = x.shape[0]; each has its own K codes.
        deterministic: False lets a GPU add with atomics, in any order and in the type of ``sums``: the fastest, its
            last bits differ from run to run, and a sum errs by up to ``n 2^-24 sum |x_r|``, besides denormals, which
            the card may take for 0. Counts stay exact. Backends without such a kernel add as ever.
        backend: one of ``fastvq.build_info()["backends"]``; None takes the fastest that supports the call.

    Returns:
        sums, float32 (float64 for float64 x), and counts, int64.

    Raises:
        ValueError: an index that is neither -1 nor a code (names the row and the value; on other devices than the CPU
            only under FASTVQ_CHECK=1), shapes or devices that do not fit, K < 1, D = 0.
        TypeError: x is no floating-point tensor, indices are not int64, mask is not bool.

    Example:
        >>> sums, counts = code_statistics(torch.randn(1000, 64), torch.randint(512, (1000,)), 512)
        >>> sums.shape, counts.shape
        (torch.Size([512, 64]), torch.Size([512]))
    """
    check_backend_name(STATISTICS, backend)
    check_integer(STATISTICS, "n_codes", n_codes)
    if n_heads is not None:
        check_integer(STATISTICS, "n_heads", n_heads)
    check_statistics(x, indices, n_codes, n_heads)
    check_mask(STATISTICS, x, mask)
    refuse_tangents(STATISTICS, NO_GRADIENT, x)
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    return _code_statistics(x.detach(), indices, n_codes, n_heads, deterministic, backend)


def ema_update_(
    codebook: Tensor,  # [K, D], or [H, K, D] with heads
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
    sums: Tensor,  # [K, D] or [H, K, D]
    counts: Tensor,  # [K] or [H, K] int64
    *,
    decay: float,
    eps: float = 1e-5,
    smoothing: Literal["laplace", "none"] = "laplace",
    debias: bool = False,
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> None:
    """One step of the exponential moving average that learns a codebook, in place, in one pass over K x D.

    .. math::
        S_k &\\leftarrow \\gamma S_k + (1-\\gamma)\\, sums_k, \\qquad
        n_k \\leftarrow \\gamma n_k + (1-\\gamma)\\, counts_k, \\qquad c_k \\leftarrow S_k / \\hat n_k

    with :math:`\\gamma` = ``decay``, S = ``embed_sum``, n = ``cluster_size`` (van den Oord et al. 2017, appendix A.1)
    and

    - ``smoothing="laplace"``: ``n^_k = (n_k + eps) / (sum n + K eps) * sum n``;
    - ``smoothing="none"``: ``n^_k = max(n_k, eps)``.

    Arithmetic is float64, each stored value is rounded once; deterministic whatever the number of threads. A head
    whose counts are all zero is left as it is: a batch without a usable vector teaches nothing. With ``eps=0`` a code
    whose size has become zero keeps its codebook row.

    ``debias`` is for buffers whose sizes start at zero. There S_k is a mere starting value that no size stands for, and
    dividing by almost zero would throw unused codes far out. With it, a code of size zero drops its S_k, and keeps its
    codebook row until a vector chooses it; from then on S_k and n_k hold the same weights, so their ratio is the
    weighted mean without a start-up bias (the correction by 1 - decay^t cancels in the ratio, so no step is counted).

    Args:
        codebook, embed_sum, cluster_size: the caller's buffers, float32 or float64, all alike, any strides.
        sums, counts: of ``code_statistics``, summed over processes where there are several.
        decay: in [0, 1].

    Raises:
        ValueError: decay outside [0, 1], eps < 0, shapes or devices that do not fit, an unknown smoothing.
        TypeError: buffers that are not float32 or float64 or differ in dtype, counts that are not int64.

    Example:
        >>> codebook, embed_sum, cluster_size = torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2)
        >>> sums, counts = torch.tensor([[2.0, 4.0], [3.0, 3.0]]), torch.tensor([2, 3])
        >>> ema_update_(codebook, embed_sum, cluster_size, sums, counts, decay=0.5, smoothing="none")
        >>> codebook
        tensor([[1., 2.],
                [1., 1.]])
    """
    check_buffers(UPDATE, codebook, embed_sum, cluster_size)
    check_backend_name(UPDATE, backend)
    check_option(UPDATE, "smoothing", smoothing, SMOOTHINGS)
    check_number(UPDATE, "decay", decay)
    check_number(UPDATE, "eps", eps)
    if not 0 <= decay <= 1:
        raise ValueError(f"{UPDATE}: decay must be in [0, 1], got {decay}; 0.99 keeps 99 % of the old average")
    if not eps >= 0:
        raise ValueError(f"{UPDATE}: eps must be 0 or more, got {eps}")
    check_float(UPDATE, "sums", sums)
    if not isinstance(counts, Tensor):
        raise TypeError(
            f"{UPDATE}: counts must be an int64 tensor, got {type(counts).__name__}; pass what code_statistics returned"
        )
    if sums.dtype not in (torch.float32, torch.float64) or counts.dtype != torch.int64:
        raise TypeError(
            f"{UPDATE}: sums must be float32 or float64 and counts int64, got {sums.dtype} and {counts.dtype}; "
            "pass what code_statistics returned"
        )
    check_dense(UPDATE, "counts", counts)
    for name, value, like in (("sums", sums, codebook), ("counts", counts, cluster_size)):
        check_same_device(UPDATE, "codebook", codebook, name, value)
        if value.shape != like.shape:
            raise ValueError(
                f"{UPDATE}: {name} must be {list(like.shape)} to match the buffers, got {list(value.shape)}; "
                "pass what code_statistics returned"
            )
    refuse_tangents(UPDATE, NO_GRADIENT, codebook, embed_sum, cluster_size, sums)
    # Without eps a code may have no weight at all: 0 / 0 is no place for it, so it stays.
    before = codebook.detach().clone() if eps == 0 else None
    with torch.no_grad():
        _ema_update(
            codebook.detach(),
            embed_sum,
            cluster_size,
            sums,
            counts,
            float(decay),
            float(eps),
            smoothing,
            debias,
            backend,
        )
        if before is not None:
            codebook.detach().copy_(torch.where(cluster_size[..., None] > 0, codebook, before))


def replace_dead_codes_(
    codebook: Tensor,  # [K, D], or [H, K, D] with heads
    embed_sum: Tensor,  # [K, D] or [H, K, D]
    cluster_size: Tensor,  # [K] or [H, K]
    x: Tensor,  # [..., D] or [H, ..., D]
    *,
    threshold: float,
    generator: torch.Generator | None = None,
    backend: Literal["cpu", "triton", "cuda", "reference"] | None = None,
) -> Tensor:  # [] int64
    """Gives every code whose cluster_size fell below ``threshold`` a randomly chosen vector of x, in place.

    A replaced code gets ``codebook = v``, ``cluster_size = threshold``, ``embed_sum = v * threshold``. Vectors that
    hold NaN or infinity are never taken, and none twice while there are enough: the usable vectors are cut, in order,
    into one stretch for each dead code, which takes one of its stretch at random. Without a usable vector nothing
    changes.

    K numbers are drawn from ``generator`` at every call, whatever is dead, so generators that started alike stay alike
    on all ranks; with the same x (gather candidates first, see ``fastvq.distributed``) so do the codebooks.

    Returns:
        How many codes were replaced, int64, on x's device; nothing waits for the device.

    Raises:
        ValueError: threshold < 0, shapes or devices that do not fit.
        TypeError: buffers that are not float32 or float64 or differ in dtype, x that is no floating-point tensor.

    Example:
        >>> codebook, embed_sum, cluster_size = torch.zeros(3, 2), torch.zeros(3, 2), torch.tensor([5.0, 0.0, 0.5])
        >>> replace_dead_codes_(codebook, embed_sum, cluster_size, torch.randn(100, 2), threshold=1.0)
        tensor(2)
        >>> cluster_size
        tensor([5., 1., 1.])
    """
    check_backend_name(REPLACE, backend)
    check_number(REPLACE, "threshold", threshold)
    check_generator(REPLACE, generator)
    check_buffers(REPLACE, codebook, embed_sum, cluster_size)
    check_candidates(codebook, x)
    if not threshold >= 0:
        raise ValueError(f"{REPLACE}: threshold must be 0 or more, got {threshold}")
    refuse_tangents(REPLACE, NO_GRADIENT, codebook, embed_sum, cluster_size, x)
    uniforms = torch.rand(cluster_size.shape, generator=generator, dtype=torch.float32, device=x.device)
    with torch.no_grad():
        return _replace_dead_codes(
            codebook.detach(), embed_sum, cluster_size, x.detach(), uniforms, float(threshold), backend
        )


def _order(call: StatisticsCall) -> Sequence[str]:
    """Rows of 8 elements are added in 0.15 ms by CUDA C++ and in 0.22 ms by Triton; wider rows are faster by Triton.

    Measured on an H100: benchmarks/results/nvidia_h100_80gb_hbm3/statistics.csv.
    """
    return CUDA_FIRST if call.x.is_cuda and call.x.shape[-1] <= 8 and call.deterministic else ORDER


def _triton(module: str, name: str) -> Callable[..., Any]:
    return triton_backend.lazy_function(f"fastvq.ops.statistics.{module}", name)


BUFFERS = ("codebook", "embed_sum", "cluster_size")
CODE_STATISTICS = Op(
    "code_statistics",
    StatisticsCall,
    {
        "cpu": Kernel(without_backend(cpu.code_statistics)),
        "triton": Kernel(
            without_backend(_triton("triton_statistics", "code_statistics")),
            lambda call: triton_backend.why_too_many_rows(call.x),
        ),
        "cuda": Kernel(
            without_backend(cuda.code_statistics),
            lambda call: cuda.why_too_many(call.indices.numel(), call.n_codes * (call.n_heads or 1)),
            (known_results(golden_calls.statistics),),
        ),
        "reference": Kernel(without_backend(reference.code_statistics)),
    },
    check=check_statistics_call,
    fake=fake_statistics,
    returns="(Tensor sums, Tensor counts)",
    order=_order,
)
EMA_UPDATE = Op(
    "ema_update_",
    UpdateCall,
    {
        "cpu": Kernel(cpu.ema_update_),
        "triton": Kernel(
            _triton("triton_update", "ema_update_"), lambda call: triton_backend.why_too_many_rows(call.codebook)
        ),
        "cuda": Kernel(cuda.ema_update_, golden=(known_results(golden_calls.ema_update),)),
        "reference": Kernel(without_backend(reference.ema_update_)),
    },
    check=check_update,
    fake=lambda call: None,
    returns="()",
    writes=BUFFERS,
)
REPLACE_DEAD_CODES = Op(
    "replace_dead_codes_",
    ReplaceCall,
    {
        "cpu": Kernel(cpu.replace_dead_codes_),
        "triton": Kernel(
            _triton("triton_replace", "replace_dead_codes_"), lambda call: triton_backend.why_too_many_rows(call.x)
        ),
        "cuda": Kernel(cuda.replace_dead_codes_),
        "reference": Kernel(without_backend(reference.replace_dead_codes_)),
    },
    check=check_replace,
    fake=lambda call: call.x.new_empty((), dtype=torch.int64),
    writes=BUFFERS,
)
_code_statistics, _ema_update, _replace_dead_codes = map(register, (CODE_STATISTICS, EMA_UPDATE, REPLACE_DEAD_CODES))
