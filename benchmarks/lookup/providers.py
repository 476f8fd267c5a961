"""Every implementation that is compared, by name: how it is set up, and why it cannot run where it cannot.

A provider of the family ``nearest`` is prepared once for a codebook and then looks vectors up. Preparing is not timed:
what an implementation may keep between calls (faiss's index) is made there, what it must do at each call is not.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import fastvq
from fastvq.backends import cpu as cpu_backend
from fastvq.backends import views
from fastvq.ops import nearest

OPENBLAS_CORES = {"avx512": "SkylakeX", "avx2": "Haswell"}

Lookup = Callable[[Tensor], "Tensor | np.ndarray"]  # x [N, D] -> indices [N]


@dataclass(frozen=True)
class Provider:
    name: str
    setting: str  # what is run exactly, and what its time leaves out
    prepare: Callable[[Tensor], Lookup]  # codebook [K, D] -> its lookup
    unavailable: Callable[[], str | None]
    family: str = "nearest"
    ours: bool = False
    isa: str | None = None  # the instruction set whose ceiling its rate is held against; None: the machine's best
    environment: Mapping[str, str] = field(default_factory=dict)
    compiles: bool = False  # its first call of a kind compiles for seconds, and in memory of its own
    input_dtype: torch.dtype = torch.float32  # x is handed over in it
    rescored: Callable[[Tensor, Tensor], float] | None = None  # x, codebook -> share of x left to the definition


def needs(package: str, extra: str = "bench") -> Callable[[], str | None]:
    def unavailable() -> str | None:
        found = importlib.util.find_spec(package) is not None
        return None if found else f'{package} is not installed; pip install -e ".[{extra}]"'

    return unavailable


def always() -> None:
    return None


def rescored_share(x: Tensor, codebook: Tensor) -> float:
    """The share of x [N, D] that the CPU kernels' filter could not decide against codebook [K, D] by itself."""
    indices = torch.empty(len(x), dtype=torch.int64)
    kept, rows = views.rows_view(x, None)
    few, all_codes = cpu_backend._cpu.nearest(
        rows, views.codes_view(codebook), views.metric_code("euclidean"), False, indices.data_ptr(), cpu_backend.isa(),
        torch.get_num_threads(), 0,
    )  # fmt: skip
    del kept  # it had to live until here
    return (few + all_codes) / len(x)


def fastvq_providers() -> list[Provider]:
    """One for each instruction set of the cpu backend; gpu_report.py measures what runs on a GPU."""
    info = fastvq.build_info()
    providers = []
    for isa in ("amx", "avx512_vnni", "avx512", "avx2", "generic"):

        def unavailable(isa: str = isa) -> str | None:
            reason = info["backends"]["cpu"]["reason"]
            if reason is None and isa not in info["cpu"]["available"]:
                reason = f"this machine or build has only {', '.join(info['cpu']['available'])}"
            return reason

        providers.append(
            Provider(
                f"fastvq {isa}",
                f"fastvq.ops.nearest, backend cpu, FASTVQ_CPU_ISA={isa}; the codebook is packed inside the time",
                lambda codebook: lambda x: nearest(x, codebook, backend="cpu"),
                unavailable,
                ours=True,
                isa=isa,
                environment={"FASTVQ_CPU_ISA": isa},
                rescored=rescored_share,
            )
        )
    return providers


def name_blas_kernels() -> None:
    """Tell faiss which kernels its BLAS may use, before faiss is loaded, unless the caller has.

    The OpenBLAS inside faiss's wheels is older than many processors it runs on, takes one that it does not know for an
    SSE3 machine, and is then four times slower than the same code on one it knows. Comparing with that means nothing.
    """
    available = fastvq.build_info()["cpu"]["available"]
    best = next((core for isa, core in OPENBLAS_CORES.items() if isa in available), None)
    if best is not None:
        os.environ.setdefault("OPENBLAS_CORETYPE", best)


def cdist_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(1)


def addmm_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.addmm((codebook * codebook).sum(1), x, codebook.t(), alpha=-2).argmin(1)


@functools.cache
def compiled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    # With dynamic sizes one compilation serves every shape; it changes no kernel here, the product being BLAS's.
    return torch.compile(function, dynamic=True)


def compiler_missing() -> str | None:
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return None if found else "torch.compile needs a C++ compiler and found none; install g++"


def prepare_faiss(codebook: Tensor) -> Lookup:
    name_blas_kernels()
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())  # an OpenMP runtime of its own, which torch does not reach
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda x: index.search(x.numpy(), 1)[1][:, 0]


def prepare_vector_quantize(codebook: Tensor) -> Lookup:
    from vector_quantize_pytorch import VectorQuantize

    n_codes, dim = codebook.shape
    module = VectorQuantize(dim=dim, codebook_size=n_codes, rotation_trick=False).eval()
    with torch.no_grad():
        module._codebook.embed.copy_(codebook[None])

    def lookup(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x[None])[1][0]

    return lookup


def peer_providers() -> list[Provider]:
    return [
        Provider(
            "cdist",
            "torch.cdist(x, c).argmin(1)",
            lambda codebook: lambda x: cdist_argmin(x, codebook),
            always,
        ),
        Provider(
            "addmm",
            "torch.addmm(|c|^2, x, c.T, alpha=-2).argmin(1), float32; |c|^2 inside the time",
            lambda codebook: lambda x: addmm_argmin(x, codebook),
            always,
        ),
        Provider(
            "addmm bf16",
            "the same in bfloat16; x and c are converted outside the time",
            lambda codebook: functools.partial(addmm_argmin, codebook=codebook.bfloat16()),
            always,
            input_dtype=torch.bfloat16,
        ),
        Provider(
            "cdist compiled",
            "cdist under torch.compile(dynamic=True)",
            lambda codebook: lambda x: compiled(cdist_argmin)(x, codebook),
            compiler_missing,
            compiles=True,
        ),
        Provider(
            "addmm compiled",
            "addmm under torch.compile(dynamic=True)",
            lambda codebook: lambda x: compiled(addmm_argmin)(x, codebook),
            compiler_missing,
            compiles=True,
        ),
        Provider(
            "faiss",
            "IndexFlatL2.search(x, 1); codes are added outside the time, threads set by omp_set_num_threads, "
            "OPENBLAS_CORETYPE set to the machine's kernels unless it was set",
            prepare_faiss,
            needs("faiss"),
        ),
        Provider(
            "vq-pytorch",
            "vector-quantize-pytorch: VectorQuantize(dim, codebook_size, rotation_trick=False) in eval mode under "
            "no_grad; gathers the codes too",
            prepare_vector_quantize,
            needs("vector_quantize_pytorch"),
        ),
    ]


def all_providers() -> dict[str, Provider]:
    """By name, fastvq's first and strongest first."""
    return {p.name: p for p in [*fastvq_providers(), *peer_providers()]}
