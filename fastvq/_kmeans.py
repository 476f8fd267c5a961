"""k-means over data in batches, built on the ops ``nearest`` and ``code_statistics``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastvq._checks import check_float, check_generator, check_integer, check_number, check_option
from fastvq.ops.nearest import nearest
from fastvq.ops.quantize import quantize
from fastvq.ops.statistics import code_statistics

__all__ = ["Collective", "KMeans", "fit", "kmeans"]

OP = "fastvq.kmeans"
METRICS = ("euclidean", "cosine")
INITS = ("k-means++", "random")
# Size of the sample that the starting codes are chosen from: SAMPLED_PER_CODE * K vectors. On patches of photographs,
# 8 K vectors gave 3 % more inertia after 25 iterations than 32 K. The start computes the distance of every sampled
# vector to each of K codes. MIN_DISTANCES enlarges the sample for small K. MAX_DISTANCES limits it for large K, where
# the start would take minutes, but not below MIN_PER_CODE * K vectors.
SAMPLED_PER_CODE, MIN_DISTANCES, MAX_DISTANCES, MIN_PER_CODE = 32, 1 << 23, 1 << 26, 4
# k-means++ picks each code as the best of several trials up to this many codes, and from one trial beyond.
MAX_CODES_WITH_TRIALS = 4096

Batches = Callable[[], Iterable[Tensor]]


class KMeans(NamedTuple):
    """Result of ``kmeans``.

    Attributes:
        codebook: [K, D].
        counts: [K] int64, number of vectors of each code.
        inertia: sum over vectors of the squared distance to their code.
        n_iter: number of iterations run.
    """

    codebook: Tensor
    counts: Tensor
    inertia: float
    n_iter: int


class Collective(NamedTuple):
    """How processes that fit one codebook exchange data. The defaults are for one process."""

    add: Callable[[list[Tensor]], list[Tensor]] = lambda tensors: tensors  # sums over processes
    join: Callable[[Tensor], Tensor] = lambda rows: (
        rows
    )  # rows [n, D], n may differ -> the rows of all processes, in the same order on each


def kmeans(
    data: Tensor | Batches,  # [N, D], or a callable returning a fresh iterator of [n, D]
    n_codes: int,
    *,
    metric: str = "euclidean",
    n_iter: int = 25,
    init: str = "k-means++",
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> KMeans:
    """Lloyd's k-means on streamed data: an iteration reads the batches once and stores K x D sums, never N x K values.

    .. math:: \\min_{c} \\sum_r |x_r - c_{index_r}|^2, \\qquad
        c_k \\leftarrow sums_k / counts_k \\; \\text{with index by nearest, sums and counts by code\\_statistics}

    A code without vectors moves to the vector of a fixed random sample that lies farthest from its nearest code.
    Vectors that hold NaN or infinity are skipped. The same data, batches, generator state and machine give the same
    codebook, bit for bit. With ``init="random"`` the number of threads does not matter either; "k-means++" weights its
    draws by a matrix product of torch, whose last bits may depend on it.

    Args:
        data: one tensor; or, for data larger than memory, a callable. It is called once for each pass and returns an
            iterator over batches, the same ones each time. float32, float64, float16 or bfloat16.
        n_codes: K, at most the number of finite vectors.
        metric: "euclidean", or "cosine": only the directions of vectors count, codes have unit length (spherical
            k-means, Dhillon and Modha 2001) and the inertia is that of the normalised vectors.
        n_iter: maximal number of iterations; 0 returns the start.
        init: "k-means++" (Arthur and Vassilvitskii 2007; the best of a few draws for each code) or "random" distinct
            vectors. Both choose from a random sample of about 32 K vectors.
        tolerance: stop when the squared movements of all codes sum to at most this times the mean variance of a column
            (as in scikit-learn).
        generator: source of random numbers; None: torch's default generator.
        progress: show a progress bar, if rich is installed.

    Returns:
        ``KMeans(codebook [K, D], counts [K], inertia, n_iter)``, codebook float32 (float64 for float64 data) on the
        data's device; counts and inertia are those of the returned codebook.

    Raises:
        ValueError: no data, fewer finite vectors than codes, batches of different widths, unknown options.
        TypeError: data that are not floating-point tensors.

    Example:
        >>> result = kmeans(torch.randn(1000, 8), 16, generator=torch.Generator().manual_seed(0))
        >>> result.codebook.shape, result.counts.shape
        (torch.Size([16, 8]), torch.Size([16]))
    """
    check_option(OP, "metric", metric, METRICS)
    check_option(OP, "init", init, INITS)
    check_integer(OP, "n_codes", n_codes)
    check_integer(OP, "n_iter", n_iter)
    check_number(OP, "tolerance", tolerance)
    check_generator(OP, generator)
    if n_codes < 1:
        raise ValueError(f"{OP}: n_codes must be at least 1, got {n_codes}")
    if n_iter < 0 or not tolerance >= 0:
        raise ValueError(f"{OP}: n_iter and tolerance must be 0 or more, got {n_iter} and {tolerance}")
    if isinstance(data, Tensor):
        whole = data

        def batches() -> Iterable[Tensor]:
            return (whole,)
    elif callable(data):
        batches = data
    else:
        raise TypeError(
            f"{OP}: data must be a tensor [N, D] or a callable returning batches, got {type(data).__name__}"
        )
    with torch.no_grad():
        result = fit(
            batches,
            n_codes,
            metric=metric,
            n_iter=n_iter,
            init=init,
            tolerance=tolerance,
            generator=generator,
            progress=progress,
            enough=True,
        )
    assert result is not None  # None only with enough=False
    return result


def fit(
    batches: Batches,
    n_codes: int,
    *,
    metric: str = "euclidean",
    n_iter: int = 25,
    init: str = "k-means++",
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    progress: bool = False,
    enough: bool = False,
    collective: Collective | None = None,
) -> KMeans | None:
    """``kmeans`` without its checks of arguments, over all processes of ``collective``, whose generators are in equal
    states.

    ``enough``: raise if there are fewer finite vectors than codes. Otherwise vectors are repeated; if there are none,
    the result is None, on every process.
    """
    collective = collective or Collective()
    normalise = metric == "cosine"
    sample = collective.join(_sample(batches, _sample_size(n_codes), generator, normalise))
    if enough and len(sample) < n_codes:
        raise ValueError(
            f"{OP}: data must hold at least {n_codes} finite vectors (n_codes = {n_codes}), got {len(sample)}; "
            "ask for fewer codes or give more data"
        )
    if not len(sample):
        return None
    codebook = _start(sample, n_codes, init, generator)
    # unbiased=False: this variance is defined for one vector too.
    limit = tolerance * sample.double().var(dim=0, unbiased=False).mean().item()
    done = 0
    with _bar(n_iter, progress) as advance:
        for done in range(1, n_iter + 1):  # noqa: B007
            sums, counts = _statistics(batches, codebook, normalise, collective)
            moved = _centres(sums, counts, codebook, normalise)
            moved = _fill_empty(moved, counts, codebook, sample, metric)
            shift = (moved.double() - codebook.double()).square().sum().item()
            codebook = moved
            advance()
            if shift <= limit:
                break
    counts, inertia = _measure(batches, codebook, normalise, collective)
    return KMeans(codebook, counts, inertia, done)


def _prepared(batches: Batches, normalise: bool) -> Iterator[Tensor]:
    """The batches [n, D], checked; scaled to unit length for cosine."""
    width = None
    given = batches()
    if not isinstance(given, Iterable):
        raise TypeError(f"{OP}: data() must return an iterator over batches [n, D], got {type(given).__name__}")
    for batch in given:
        check_float(OP, "data", batch)
        if batch.dim() != 2 or batch.shape[1] == 0 or (width is not None and batch.shape[1] != width):
            raise ValueError(
                f"{OP}: data must be [N, D] with D {'>= 1' if width is None else f'= {width} as before'}, "
                f"got {list(batch.shape)}; flatten all but the last dimension"
            )
        width = batch.shape[1]
        if normalise:
            batch = torch.nn.functional.normalize(batch if batch.dtype == torch.float64 else batch.float(), dim=-1)
        yield batch


def _random(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64).to(like.device)


def _sample_size(n_codes: int) -> int:
    size = max(SAMPLED_PER_CODE * n_codes, MIN_DISTANCES // n_codes)
    return max(MIN_PER_CODE * n_codes, min(size, MAX_DISTANCES // n_codes))


def _sample(batches: Batches, size: int, generator: torch.Generator | None, normalise: bool) -> Tensor:
    """A uniform random sample of at most ``size`` finite vectors of the whole stream.

    Every vector gets a random number; the vectors with the smallest numbers are the sample.
    """
    keys, kept = None, None
    for batch in _prepared(batches, normalise):
        low, high = torch.aminmax(batch, dim=-1) if len(batch) else (batch[:, 0], batch[:, 0])
        usable = low.isfinite() & high.isfinite()
        numbers = torch.where(usable, _random((len(batch),), generator, batch), torch.inf)
        chosen = numbers.topk(min(size, len(batch)), largest=False).indices
        chosen = chosen[numbers[chosen].isfinite()]
        rows = batch[chosen] if batch.dtype == torch.float64 else batch[chosen].float()
        keys = numbers[chosen] if keys is None else torch.cat([keys, numbers[chosen]])
        kept = rows if kept is None else torch.cat([kept, rows])
        best = keys.topk(min(size, len(keys)), largest=False).indices
        keys, kept = keys[best], kept[best]
    if kept is None:
        raise ValueError(f"{OP}: data must hold at least one batch, got none; a callable must return a fresh iterator")
    return kept


def _start(sample: Tensor, n_codes: int, init: str, generator: torch.Generator | None) -> Tensor:
    n_sampled = len(sample)
    if init == "random" or n_sampled <= n_codes:
        # With fewer vectors than codes, vectors repeat; their numbers of copies differ by at most one.
        order = _random((n_sampled,), generator, sample).argsort()
        return sample[order[torch.arange(n_codes, device=sample.device) % n_sampled]].clone()
    # Distances only weight the draws, so a float32 product of centred vectors is exact enough.
    centred = (sample - sample.mean(dim=0)).float()
    columns = centred.t().contiguous()
    square = centred.square().sum(dim=1)
    chosen = torch.empty(n_codes, dtype=torch.int64, device=sample.device)
    distance = torch.full_like(square, torch.inf)
    candidates = (_random((1,), generator, sample) * n_sampled).long()
    n_trials = 2 + int(math.log(n_codes)) if n_codes <= MAX_CODES_WITH_TRIALS else 1
    draws = _random((n_codes, n_trials), generator, sample)
    for k in range(n_codes):
        if k > 0:
            cumulative = distance.double().cumsum(0)
            candidates = torch.searchsorted(cumulative, draws[k] * cumulative[-1], right=True).clamp_(max=n_sampled - 1)
        # [trials, M]: distance to the nearest code, if the candidate became a code
        new_distance = torch.addmm(square, centred[candidates], columns, alpha=-2).add_(square[candidates][:, None])
        new_distance = torch.minimum(new_distance.clamp_(min=0), distance)
        best = new_distance.sum(dim=1).argmin()[None]
        chosen[k] = candidates.index_select(0, best)[0]
        distance = new_distance.index_select(0, best)[0]
    return sample[chosen]


def _statistics(
    batches: Batches, codebook: Tensor, normalise: bool, collective: Collective
) -> tuple[Tensor, Tensor]:  # [K, D] float64, [K]
    total_sums = torch.zeros_like(codebook, dtype=torch.float64)
    total_counts = torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device)
    for batch in _prepared(batches, normalise):
        sums, counts = code_statistics(batch, nearest(batch, codebook), len(codebook))
        total_sums += sums
        total_counts += counts
    sums, counts = collective.add([total_sums, total_counts])
    return sums, counts


def _centres(sums: Tensor, counts: Tensor, codebook: Tensor, normalise: bool) -> Tensor:
    centres = sums / counts.clamp(min=1)[:, None]
    if normalise:
        length = centres.norm(dim=1, keepdim=True)
        # Vectors whose sum is zero have no mean direction: the code does not move.
        centres = torch.where(length > 0, centres / length, codebook.double())
    return torch.where(counts[:, None] > 0, centres, codebook.double()).to(codebook.dtype)


def _fill_empty(moved: Tensor, counts: Tensor, codebook: Tensor, sample: Tensor, metric: str) -> Tensor:
    empty = (counts == 0).nonzero()[:, 0]
    if not len(empty):
        return moved
    # For cosine all vectors have unit length, and euclidean distances have the same order.
    distance = (sample - moved[nearest(sample, moved)]).square().sum(dim=1)
    far = distance.topk(min(len(empty), len(sample)))
    far_rows = far.indices[far.values > 0]  # a vector at distance 0 is a code already
    return moved.index_copy(0, empty[: len(far_rows)], sample[far_rows])


def _measure(batches: Batches, codebook: Tensor, normalise: bool, collective: Collective) -> tuple[Tensor, float]:
    counts = torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device)
    inertia = torch.zeros((), dtype=torch.float64, device=codebook.device)
    for batch in _prepared(batches, normalise):
        usable = batch.isfinite().all(dim=-1)
        q = quantize(batch, codebook, mask=usable, estimator="none")
        counts += torch.bincount(q.indices + 1, minlength=len(codebook) + 1)[1:]
        inertia += q.codebook_loss.double() * usable.sum() * batch.shape[1]
    counts, inertia = collective.add([counts, inertia])
    return counts, inertia.item()


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], None]]:
    if not show or not importlib.util.find_spec("rich"):
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("k-means", total=total)
        yield lambda: bar.advance(task)
