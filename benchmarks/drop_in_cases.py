"""The quantizers of ``bench_drop_in.py``, at the shapes of real models."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
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


def encodec() -> Prepared:
    core = part("encodec.quantization.core_vq")
    model = core.ResidualVectorQuantization(num_quantizers=8, dim=128, codebook_size=1024, kmeans_init=False)
    return training(model, torch.randn(16, 128, 300), "4800x8x1024x128", lambda out: (out[0], out[2], out[1]))


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
    quantizer = seeded(getattr(module, f"{name}ResidualVectorQuantizer")(config), "embed", "embed_sum")
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


def chameleon() -> Prepared:
    module = importlib.import_module("transformers.models.chameleon.modeling_chameleon")
    model = module.ChameleonVQVAEVectorQuantizer(SimpleNamespace(num_embeddings=8192, embed_dim=256))
    x = torch.randn(4, 256, 32, 32)
    return inference(model, "4096x8192x256", lambda m: m(x)[2])


def diffusers_large() -> Prepared:
    """VQGAN's codebook at the size where its N x K distances take 4 GiB."""
    module = importlib.import_module("diffusers.models.autoencoders.vae")
    model = module.VectorQuantizer(16384, 8, 0.25)
    nn.init.normal_(model.embedding.weight)
    x = torch.randn(16, 8, 64, 64)
    return inference(model, "65536x16384x8", lambda m: m(x)[2][2])


CASES: dict[str, Callable[[], Prepared]] = {
    "vq-pytorch VectorQuantize, train": lambda: vq(65536, 1024, 64, True),
    "vq-pytorch VectorQuantize, eval": lambda: vq(65536, 1024, 64, False),
    "vq-pytorch ResidualVQ, train": lambda: residual_vq(True),
    "vq-pytorch ResidualVQ, eval": lambda: residual_vq(False),
    "vq-pytorch at VQ-VAE-2's size, train": lambda: vq(65536, 512, 64, True),
    "encodec, train": encodec,
    "moshi, encode": moshi,
    "transformers Encodec, encode": lambda: transformers_residual("encodec", "Encodec", 128, 1024, 16384),
    "transformers Mimi, encode": lambda: transformers_residual("mimi", "Mimi", 256, 2048, 2000),
    "transformers DAC, encode": dac,
    "transformers Chameleon, encode": chameleon,
    "diffusers VectorQuantizer, train": lambda: diffusers(1024, 256, 16),
    "diffusers at VAR's size, train": lambda: diffusers(4096, 32, 16),
    "diffusers VectorQuantizer, encode": diffusers_large,
}
