"""Every misuse has its message: op, argument, what was expected, what came, what to do."""

import dataclasses

import pytest
import torch

import fastvq
from fastvq.ops import nearest, quantize, vq_step
from fastvq.ops.nearest import NEAREST
from fastvq.ops.nearest.call import NearestCall

X, C = torch.zeros(6, 64), torch.zeros(512, 64)
MASK = torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize("op", [nearest, quantize, vq_step])
@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        ((X, torch.zeros(512, 32)), {}, ValueError,
         r"codebook must be \[K, D\] with D = 64 to match x, got \[512, 32\]; transpose it or project x first"),
        ((X, torch.zeros(0, 64)), {}, ValueError, r"at least one code \(K >= 1\), got \[0, 64\]"),
        ((torch.zeros(6, 0), torch.zeros(5, 0)), {}, ValueError, r"x must be \[..., D\] with D >= 1, got \[6, 0\]"),
        ((torch.tensor(1.0), C), {}, ValueError, r"x must be \[..., D\], got a scalar"),
        ((X, torch.zeros(64)), {}, ValueError, r"codebook must be \[K, D\], or \[H, K, D\] with heads, got \[64\]"),
        ((X, torch.zeros(2, 512, 64)), {}, ValueError, r"x must be \[H, ..., D\] with H = 2, got \[6, 64\]"),
        ((torch.zeros(0, 6, 64), torch.zeros(0, 5, 64)), {}, ValueError, r"at least one head"),
        ((X.long(), C), {}, TypeError, r"x must be float32, float64, float16 or bfloat16, got torch.int64; .*\.float"),
        ((X, C.to(torch.complex64)), {}, TypeError, r"codebook must be float32.*got torch.complex64"),
        (([[1.0]], C), {}, TypeError, r"x must be a torch.Tensor, got list; convert it with torch.as_tensor"),
        ((X, C.to_sparse()), {}, TypeError, r"codebook must be a dense tensor, got layout torch.sparse_coo"),
        ((X, C.to("meta")), {}, ValueError, r"x and codebook must be on one device, got cpu and meta; move one"),
        ((X, C), {"metric": "l2"}, ValueError, r"metric must be one of 'euclidean', 'cosine', 'dot', got 'l2'"),
        ((X, C), {"precision": "tf32"}, ValueError, r"precision must be one of 'exact', 'fast', got 'tf32'"),
        ((X, C), {"backend": "metal"}, ValueError, r"backend must be one of .*reference or None, got 'metal'"),
    ],
)  # fmt: skip
def test_bad_arguments(op, arguments, options, error, message):
    with pytest.raises(error, match=rf"fastvq.ops.{op.__name__}: .*{message}"):
        op(*arguments, **options)


@pytest.mark.parametrize("op", [quantize, vq_step])
@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"estimator": "gumbel"}, ValueError, r"estimator must be one of 'straight_through', 'rotation', 'none'"),
        ({"mask": MASK.float()}, TypeError, r"mask must be a bool tensor, got torch.float32; True marks a real vector"),
        ({"mask": [True] * 6}, TypeError, r"mask must be a bool tensor, got list"),
        ({"mask": MASK[:5]}, ValueError, r"mask must be \[6\], one element a vector of x \[6, 64\], got \[5\]"),
        ({"mask": MASK.to("meta")}, ValueError, r"x and mask must be on one device, got cpu and meta"),
    ],
)
def test_bad_options_of_quantize(op, options, error, message):
    with pytest.raises(error, match=rf"fastvq.ops.{op.__name__}: .*{message}"):
        op(X, C, **options)


def test_a_named_backend_never_falls_back():
    x, codebook = X.to("meta"), C.to("meta")
    assert nearest(x, codebook).shape == (6,)  # shapes need no backend
    if not torch.cuda.is_available():
        return
    with pytest.raises(ValueError, match=r"no backend can serve .* \(cpu: it takes CPU tensors, x is on cuda:0\)"):
        nearest(X.cuda(), C.cuda(), backend="cpu")


def test_every_refusal_is_listed():
    broken = {
        name: dataclasses.replace(kernel, why_unsupported=lambda call, name=name: f"{name} is out")
        for name, kernel in NEAREST.kernels.items()
    }
    call = NearestCall(X, C, "euclidean", "exact", False, None)
    with pytest.raises(ValueError, match=r"an.op: no backend can serve this call \(cpu: cpu is out; .*reference: ref"):
        dataclasses.replace(NEAREST, public_name="an.op", kernels=broken).choose(call)
    alone = dataclasses.replace(NEAREST, kernels={"reference": NEAREST.kernels["reference"]})
    with pytest.raises(ValueError, match=r"\(cpu: it does not have this operation\); pass backend=None"):
        alone.choose(call._replace(backend="cpu"))


def test_use_backend():
    with fastvq.use_backend("reference"):
        nearest(X, C)
        with pytest.raises(ValueError, match=r"fastvq.use_backend: backend must be one of"):
            fastvq.use_backend("metal").__enter__()
    with pytest.raises(RuntimeError, match="leave"), fastvq.use_backend("cpu"):
        raise RuntimeError("leave")
    from fastvq.backends import registry

    assert registry._override.get() is None


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("FASTVQ_BACKEND", "reference")
    nearest(X, C)
    monkeypatch.setenv("FASTVQ_BACKEND", "metal")
    with pytest.raises(ValueError, match=r"FASTVQ_BACKEND='metal': expected one of cpu, triton, cuda, reference"):
        nearest(X, C)
    nearest(X, C, backend="reference")  # a named one is not looked up


def test_instruction_set_from_the_environment(monkeypatch):
    from fastvq.backends import cpu as cpu_backend

    monkeypatch.setenv("FASTVQ_CPU_ISA", "neon")
    with pytest.raises(
        ValueError, match=r"FASTVQ_CPU_ISA='neon': expected one of generic, avx2, avx512, avx512_vnni, amx, emulated"
    ):
        nearest(X, C)
    monkeypatch.setenv("FASTVQ_CPU_ISA", "avx512")
    monkeypatch.setattr(cpu_backend, "ISAS_HERE", ["generic", "avx2"])
    with pytest.raises(ValueError, match=r"FASTVQ_CPU_ISA=avx512: this machine .* has generic, avx2; set one of those"):
        nearest(X, C)
