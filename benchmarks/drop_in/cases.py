"""The quantizers of ``bench_drop_in.py``, at the shapes of real models.

Those of repositories that are no packages are the plain ones that the tests compare with; their names say "(double)".
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Prepared:
    """A quantizer, one step of it, and its indices for the comparison."""

    model: nn.Module
    shape: str
    step: Callable[[nn.Module], object]
    indices: Callable[[nn.Module], Tensor]


def part(module: str) -> ModuleType:
    """A submodule without its package's ``__init__``, which may import audio libraries that no quantizer needs."""
    package = module.partition(".")[0]
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ImportError(f"{package} is not installed")
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or ())
    return importlib.import_module(module)


def doubles() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tests" / "compat" / "doubles.py"
    spec = importlib.util.spec_from_file_location("doubles", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training(
    model: nn.Module, x: Tensor, shape: str, picks: Callable[[Any], tuple[Tensor, Tensor, Tensor]]
) -> Prepared:
    """Forward and backward of quantized values and loss. ``picks`` gives (quantized, loss, indices)."""
    x.requires_grad_()

    def step(m: nn.Module) -> None:
        quantized, loss, _ = picks(m(x))
        (quantized.mean() + loss.sum()).backward()
        x.grad = None
        m.zero_grad(set_to_none=True)

    return Prepared(model.train(), shape, step, lambda m: picks(m(x))[2])


def inference(model: nn.Module, shape: str, call: Callable[[Any], Tensor]) -> Prepared:
    @torch.no_grad()
    def step(m: nn.Module) -> Tensor:
        return call(m)

    return Prepared(model.eval(), shape, step, step)


def seeded(model: nn.Module, *names: str) -> nn.Module:
    """Random codes where a constructor leaves zeros for a checkpoint to fill."""
    for name, buffer in model.named_buffers():
        if name.endswith(names):
            buffer.normal_()
    return model


def vq(n: int, k: int, d: int, train: bool) -> Prepared:
    model = importlib.import_module("vector_quantize_pytorch").VectorQuantize(d, k)
    x = torch.randn(1, n, d)
    if train:
        return training(model, x, f"{n}x{k}x{d}", lambda out: (out[0], out[2], out[1]))
    return inference(model, f"{n}x{k}x{d}", lambda m: m(x)[1])


def residual_vq(train: bool) -> Prepared:
    model = importlib.import_module("vector_quantize_pytorch").ResidualVQ(dim=128, codebook_size=1024, num_quantizers=8)
    x, shape = torch.randn(1, 16384, 128), "16384x8x1024x128"
    if train:
        return training(model, x, shape, lambda out: (out[0], out[2], out[1]))
    return inference(model, shape, lambda m: m(x)[1])


def encodec(train: bool) -> Prepared:
    core = part("encodec.quantization.core_vq")
    model = core.ResidualVectorQuantization(num_quantizers=8, dim=128, codebook_size=1024, kmeans_init=False)
    x, shape = torch.randn(16, 128, 300), "4800x8x1024x128"
    if train:
        return training(model, x, shape, lambda out: (out[0], out[2], out[1]))
    return inference(model, shape, lambda m: m.encode(x))


def moshi() -> Prepared:
    core = part("moshi.quantization.core_vq")
    model = core.ResidualVectorQuantization(num_quantizers=8, codebook_offset=0, dim=256, codebook_size=2048)
    x = torch.randn(16, 256, 125)
    return inference(seeded(model, "embedding_sum"), "2000x8x2048x256", lambda m: m.encode(x))


def transformers_residual(model: str, name: str, dim: int, codes: int, n: int) -> Prepared:
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config = SimpleNamespace(
        codebook_size=codes, codebook_dim=dim, num_quantizers=8, frame_rate=75, hidden_size=dim,
        vector_quantization_hidden_dimension=dim,
    )  # fmt: skip
    cls = getattr(module, f"{name}ResidualVectorQuantiz" + ("ation" if model == "xcodec" else "er"))
    quantizer = seeded(cls(config), "embed", "embed_sum")
    x = torch.randn(16, dim, n // 16)
    return inference(quantizer, f"{n}x8x{codes}x{dim}", lambda m: m.encode(x))


def dac() -> Prepared:
    module = importlib.import_module("transformers.models.dac.modeling_dac")
    config = SimpleNamespace(codebook_dim=8, hidden_size=1024, codebook_size=1024, n_codebooks=9, quantizer_dropout=0.0)
    x = torch.randn(8, 1024, 860)
    return inference(module.DacResidualVectorQuantizer(config), "6880x9x1024x8", lambda m: m(x)[1])


def diffusers(k: int, d: int, side: int) -> Prepared:
    model = importlib.import_module("diffusers.models.autoencoders.vae").VectorQuantizer(k, d, 0.25)
    nn.init.normal_(model.embedding.weight)
    n = 16 * side * side
    return training(model, torch.randn(16, d, side, side), f"{n}x{k}x{d}", lambda out: (out[0], out[1], out[2][2]))


def transformers_image(model: str, name: str, k: int, d: int, side: int) -> Prepared:
    """Four images; a video of one frame for Emu3, which returns indices alone."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    config = SimpleNamespace(num_embeddings=k, codebook_size=k, embed_dim=d, num_patches=side)
    quantizer = getattr(module, f"{name}VQVAEVectorQuantizer")(config)
    nn.init.normal_(quantizer.embedding.weight)
    x = torch.randn(4, d, side, side)
    x = x[:, None] if model == "emu3" else x
    call = (lambda m: m(x)) if model == "emu3" else (lambda m: m(x)[2])
    return inference(quantizer, f"{4 * side * side}x{k}x{d}", call)


def diffusers_large() -> Prepared:
    """VQGAN's codebook at the size where its N x K distances take 4 GiB."""
    module = importlib.import_module("diffusers.models.autoencoders.vae")
    model = module.VectorQuantizer(16384, 8, 0.25)
    nn.init.normal_(model.embedding.weight)
    x = torch.randn(16, 8, 64, 64)
    return inference(model, "65536x16384x8", lambda m: m(x)[2][2])


def taming() -> Prepared:
    model = doubles().VectorQuantizer2(1024, 256, 0.25)
    nn.init.normal_(model.embedding.weight)
    return training(model, torch.randn(16, 256, 16, 16), "4096x1024x256", lambda out: (out[0], out[1], out[2][2]))


def var() -> Prepared:
    """Ten scales from 1x1 to 16x16; the indices are those of the training step's scales, which it does not return."""
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    model = doubles().ScaleQuantizer(4096, 32, False, v_patch_nums=sides)
    x = torch.randn(16, 32, 16, 16)
    prepared = training(model, x, f"{16 * sum(n * n for n in sides)}x4096x32", lambda out: (out[0], out[2], out[2]))
    prepared.indices = lambda m: torch.cat(m.f_to_idxBl_or_fhat(x.detach(), to_fhat=False), dim=1)
    return prepared


def rosinality() -> Prepared:
    model = doubles().Quantize(64, 512)
    return training(model, torch.randn(16, 64, 64, 64), "65536x512x64", lambda out: out)


def unixpickle() -> Prepared:
    model = doubles().VQ(64, 512)
    return training(model, torch.randn(16, 64, 64, 64), "65536x512x64", lambda out: (out[1], out[0].mean(), out[2]))


def sim_vq() -> Prepared:
    model = importlib.import_module("vector_quantize_pytorch").SimVQ(64, 1024)
    return training(model, torch.randn(1, 16384, 64), "16384x1024x64", lambda out: (out[0], out[2], out[1]))


def grouped() -> Prepared:
    vqp = importlib.import_module("vector_quantize_pytorch")
    model = vqp.GroupedResidualVQ(dim=128, codebook_size=1024, num_quantizers=8, groups=2)
    x = torch.randn(1, 4096, 128)
    return inference(model, "2 of 4096x8x1024x64", lambda m: m(x)[1])


def cosine_heads() -> Prepared:
    vqp = importlib.import_module("vector_quantize_pytorch")
    model = vqp.VectorQuantize(
        512, 1024, heads=8, codebook_dim=64, separate_codebook_per_head=True, use_cosine_sim=True
    )
    x = torch.randn(1, 2048, 512)
    return training(model, x, "8 of 2048x1024x64", lambda out: (out[0], out[2], out[1]))


CASES: dict[str, Callable[[], Prepared]] = {
    "vq-pytorch VectorQuantize, train": lambda: vq(65536, 1024, 64, True),
    "vq-pytorch VectorQuantize, eval": lambda: vq(65536, 1024, 64, False),
    "vq-pytorch VectorQuantize, 8 heads, cosine, train": cosine_heads,
    "vq-pytorch ResidualVQ, train": lambda: residual_vq(True),
    "vq-pytorch ResidualVQ, eval": lambda: residual_vq(False),
    "vq-pytorch GroupedResidualVQ, eval": grouped,
    "vq-pytorch SimVQ, train": sim_vq,
    "encodec, train": lambda: encodec(True),
    "encodec, encode": lambda: encodec(False),
    "moshi, encode": moshi,
    "transformers Encodec, encode": lambda: transformers_residual("encodec", "Encodec", 128, 1024, 16384),
    "transformers Xcodec, encode": lambda: transformers_residual("xcodec", "Xcodec", 128, 1024, 4096),
    "transformers Mimi, encode": lambda: transformers_residual("mimi", "Mimi", 256, 2048, 2000),
    "transformers DAC, encode": dac,
    "transformers Chameleon, encode": lambda: transformers_image("chameleon", "Chameleon", 8192, 256, 32),
    "transformers Janus, encode": lambda: transformers_image("janus", "Janus", 16384, 8, 24),
    "transformers Emu3, encode": lambda: transformers_image("emu3", "Emu3", 32768, 4, 32),
    "transformers GLM-Image, encode": lambda: transformers_image("glm_image", "GlmImage", 16384, 256, 16),
    "diffusers VectorQuantizer, train": lambda: diffusers(1024, 256, 16),
    "diffusers VectorQuantizer, encode": diffusers_large,
    "taming VectorQuantizer2 (double), train": taming,
    "VAR VectorQuantizer2 (double), train": var,
    "rosinality Quantize (double), train": rosinality,
    "unixpickle VQ (double), train": unixpickle,
}
