"""torch.export.save and load of every module: the same results to the bit, the same types."""

import io

import pytest
import torch
from torch import nn

from fastvq.models import VQVAE, VQVAE2, PixelCNN
from fastvq.nn import GatedMaskedConv2d, GroupedVQ, MaskedConv2d, ResidualVQ, VectorQuantizer

VECTORS = (torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),)
PICTURES = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)
IDS = (torch.arange(32).view(2, 4, 4) % 7,)
MODULES = {
    "plain": (lambda: VectorQuantizer(8, 16), VECTORS),
    "cosine, learnable": (lambda: VectorQuantizer(8, 16, metric="cosine", learnable=True), VECTORS),
    "projected, heads": (lambda: VectorQuantizer(8, 16, code_dim=3, heads=2), VECTORS),
    "started by kmeans": (lambda: VectorQuantizer(8, 16, kmeans_init=True), VECTORS),
    "grouped": (lambda: GroupedVQ(8, 16, 2), VECTORS),
    "residual": (lambda: ResidualVQ(8, 16, 3, estimator="rotation"), VECTORS),
    "residual, dropout": (lambda: ResidualVQ(8, 16, 3, quantize_dropout=True), VECTORS),
    "masked convolution": (lambda: MaskedConv2d(3, 6, 3), PICTURES),
    "gated": (lambda: GatedMaskedConv2d(3, 4, 3), PICTURES),
    "PixelCNN": (lambda: PixelCNN(7, 8, 2), IDS),
    "VQVAE": (lambda: VQVAE(3, 8, 16, 4), PICTURES),
    "VQVAE, residual": (lambda: VQVAE(3, 8, 16, 4, quantizer="residual", depth=2), PICTURES),
    "VQVAE2": (lambda: VQVAE2(3, 8, 16, 4), PICTURES),
    "VQVAE.encode": (lambda: Method(VQVAE(3, 8, 16, 4), "encode"), PICTURES),
    "VQVAE.decode": (lambda: Method(VQVAE(3, 8, 16, 4), "decode"), IDS),
    "VQVAE2.decode": (lambda: Maps(VQVAE2(3, 8, 16, 4)), (torch.arange(2).view(2, 1, 1), torch.zeros(2, 2, 2).long())),
    "VectorQuantizer.decode": (lambda: Method(VectorQuantizer(8, 16), "decode"), IDS),
    "ResidualVQ.encode": (lambda: Method(ResidualVQ(8, 16, 3), "encode"), VECTORS),
}


class Method(nn.Module):
    """Another method of a module as a forward, which is what torch.export exports."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x):
        return getattr(self.module, self.name)(x)


class Maps(Method):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "decode_maps")

    def forward(self, top, bottom):
        return self.module.decode_maps([top, bottom])


def leaves(result):
    return [t for t in torch.utils._pytree.tree_leaves(result) if t is not None]


@pytest.mark.parametrize("name", MODULES)
def test_saved_and_loaded(name):
    torch.manual_seed(0)
    make, arguments = MODULES[name]
    module = make().eval()
    with torch.no_grad():
        exported = torch.export.export(module, arguments)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.manual_seed(1)
    ours = module(*arguments)
    torch.manual_seed(1)
    theirs = loaded(*arguments)
    assert type(ours) is type(theirs)
    assert all(torch.equal(a, b) for a, b in zip(leaves(ours), leaves(theirs), strict=True))


def test_decode_is_exported_for_any_size():
    model = VQVAE(3, 8, 16, 4).eval()
    batch, height = torch.export.Dim("batch", max=64), torch.export.Dim("height", max=64)
    exported = torch.export.export(
        Method(model, "decode"), IDS, dynamic_shapes={"x": {0: batch, 1: height, 2: torch.export.Dim.STATIC}}
    )
    ids = torch.randint(16, (5, 9, 4))
    assert torch.equal(exported.module()(ids), model.decode(ids))
