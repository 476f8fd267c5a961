"""ONNX graphs of standard operators, run by onnxruntime: the indices are those of fastvq, ties included."""

import pytest
import torch

from fastvq.models import VQVAE
from fastvq.nn import GroupedVQ, ResidualVQ, VectorQuantizer
from fastvq.onnx import decompositions
from tests.nn.test_export import Method

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")

D, K = 6, 17


def vectors(codebook):
    """Gaussian rows, codes themselves, midpoints of codes, permutations of one vector, large and tiny rows, NaN."""
    g = torch.Generator().manual_seed(3)
    codes = codebook.detach().reshape(-1, codebook.shape[-1])[:K]
    codes = codes.repeat(1, D // codes.shape[1])
    permuted = torch.stack([torch.linspace(-1, 1, D)[torch.randperm(D, generator=g)] for _ in range(40)])
    rows = torch.cat([torch.randn(300, D, generator=g), codes, (codes[1:] + codes[:-1]) / 2, permuted])
    rows = torch.cat([rows, rows[:50] * 1e17, rows[:50] * 1e-30])
    rows[7, 2], rows[9, 0] = torch.nan, torch.inf
    return rows


def run(module, x, **options):
    program = torch.export.export(module.eval(), (x,)).run_decompositions(decompositions())
    model = torch.onnx.export(program, (x,), dynamo=True, verbose=False, **options).model_proto
    domains = {node.domain for node in model.graph.node}
    assert domains <= {"", "ai.onnx"}, domains
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def tied(module):
    with torch.no_grad():
        module.codebook[..., 5, :] = module.codebook[..., 2, :]  # duplicates: the lower index wins
        module.codebook[..., 11, :] = 0
        module.codebook[..., 13, 1] = torch.inf
    return module


MODULES = {
    "euclidean": lambda: tied(VectorQuantizer(D, K)),
    "dot": lambda: tied(VectorQuantizer(D, K, metric="dot")),
    "cosine": lambda: VectorQuantizer(D, K, metric="cosine"),
    "grouped": lambda: tied(GroupedVQ(D, K, 2)),
    "residual": lambda: ResidualVQ(D, K, 3),
}


@pytest.mark.parametrize("name", MODULES)
def test_indices_are_those_of_the_module(name):
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    x = vectors(module.codebook)
    quantized, indices, *_ = run(module, x)
    expected = module(x)
    assert torch.equal(torch.from_numpy(indices), expected.indices)
    assert torch.equal(torch.from_numpy(quantized), expected.quantized)


def test_a_picture_is_encoded_and_decoded():
    torch.manual_seed(0)
    model = VQVAE(3, 8, 16, 4).eval()
    ids = torch.arange(32).view(2, 4, 4) % 16
    (picture,) = run(Method(model, "decode"), ids)
    assert torch.allclose(torch.from_numpy(picture), model.decode(ids), rtol=1e-4, atol=1e-5)
    (found,) = run(Method(model, "encode"), torch.randn(2, 3, 16, 16))
    assert found.shape == (2, 4, 4) and found.min() >= 0 and found.max() < 16
