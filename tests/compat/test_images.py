"""Image quantizers: diffusers, transformers' four, and those written afresh in ``doubles``."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastvq
from fastvq.compat import rosinality, taming, unixpickle, var
from tests.support.compat import doubles
from tests.support.compat.lockstep import Lookup, lockstep
from tests.support.compat.peers import peer

B, D, K, SIDE = 2, 8, 24, 8


def image(step: int) -> torch.Tensor:
    return torch.randn(B, D, SIDE, SIDE, generator=torch.Generator().manual_seed(step)) / K


def flatten(outputs) -> list:
    return [part for one in outputs for part in (flatten(one) if isinstance(one, tuple) else [one])]


def by_embedding(index, metric="euclidean"):
    """Looks at a lookup of [B, D, H, W] in ``embedding``; ``index(outputs)`` finds the indices."""

    def look(module, x, outputs, state):
        return Lookup(x.movedim(1, -1).reshape(-1, D), state["embedding.weight"], index(outputs).flatten(), metric)

    return look


LAST = by_embedding(lambda outputs: outputs[2])
DEEP = by_embedding(lambda outputs: outputs[2][2])


@pytest.mark.parametrize("options", [{}, {"legacy": False}, {"sane_index_shape": True}], ids=str)
@pytest.mark.parametrize("which", ["taming", "diffusers"])
def test_taming_and_diffusers(which, options):
    mine = which == "taming"
    cls = doubles.VectorQuantizer2 if mine else peer("diffusers.models.autoencoders.vae").VectorQuantizer
    lockstep(lambda: cls(K, D, 0.25, **options), image, lambda m, x: flatten(m(x)), cls.__name__, DEEP)


def test_taming_remaps_its_indices():
    theirs = doubles.VectorQuantizer2(K, D, 0.25, remap="a table")
    ours = doubles.VectorQuantizer2(K, D, 0.25, remap="a table")
    ours.load_state_dict(theirs.state_dict())
    fastvq.patch(ours)
    assert torch.equal(ours(image(0))[2][2], theirs(image(0))[2][2])


@pytest.mark.parametrize("model, name", [("chameleon", "Chameleon"), ("janus", "Janus"), ("glm_image", "GlmImage")])
def test_transformers(model, name):
    cls = getattr(peer(f"transformers.models.{model}.modeling_{model}"), f"{name}VQVAEVectorQuantizer")
    config = SimpleNamespace(num_embeddings=K, embed_dim=D, beta=0.25, num_patches=SIDE)
    look = LAST if model != "glm_image" else by_embedding(lambda outputs: outputs[2], "cosine")
    lockstep(lambda: cls(config), image, lambda m, x: m(x), cls.__name__, look)


def test_emu3():
    cls = peer("transformers.models.emu3.modeling_emu3").Emu3VQVAEVectorQuantizer

    def look(module, x, outputs, state):
        return Lookup(x.movedim(2, -1).reshape(-1, D), state["embedding.weight"], outputs.flatten())

    lockstep(
        lambda: cls(SimpleNamespace(codebook_size=K, embed_dim=D)),
        lambda step: image(step)[:, None], lambda m, x: [m(x)], cls.__name__, look,
    )  # fmt: skip


def rosinality_look(module, x, outputs, state):
    return Lookup(x.reshape(-1, D), state["embed"].T, outputs[2].flatten())


def seasoned(cls):
    """Sizes that have left zero, where the peer's division by almost nothing multiplies every rounding."""
    made = cls(D, K)
    made.cluster_size.fill_(1.0)
    return made


def test_rosinality():
    lockstep(
        lambda: seasoned(doubles.Quantize),
        lambda step: image(step).movedim(1, -1), lambda m, x: m(x), "Quantize", rosinality_look,
    )  # fmt: skip


def test_rosinality_debiased_keeps_unused_codes():
    plain, debiased = rosinality.Quantize(D, K), rosinality.Quantize(D, K, debias=True)
    debiased.load_state_dict(plain.state_dict())
    before = plain.embed.clone()
    x = before.T[:4].clone()
    plain(x), debiased(x)
    assert float(plain.embed[:, 4:].abs().max()) > 1e3
    assert torch.equal(debiased.embed[:, 4:], before[:, 4:])
    # One vector a code: itself, but for the smoothing, which takes eps K from sizes that sum to 4 (1 - decay).
    torch.testing.assert_close(debiased.embed[:, :4], before[:, :4], rtol=1e-5 * K / 0.04, atol=0)


def test_unixpickle():
    def look(module, x, outputs, state):
        return Lookup(x.movedim(1, -1).reshape(-1, D), state["dictionary"], outputs[2].flatten())

    lockstep(lambda: doubles.VQ(D, K, dead_rate=3), image, lambda m, x: m(x), "VQ", look)


@pytest.mark.parametrize("znorm", [False, True])
def test_var(znorm):
    def look(module, x, outputs, state):
        """The first scale's lookup, whose input is the mean of the map; the others follow from its residual."""
        rows = F.interpolate(x, size=(1, 1), mode="area").flatten(1)
        index = module.f_to_idxBl_or_fhat(x, to_fhat=False)[0].flatten()
        return Lookup(rows, state["embedding.weight"], index, "cosine" if znorm else "euclidean")

    def call(model, x):
        scales = model.f_to_idxBl_or_fhat(x.detach(), to_fhat=False)
        return [*model(x), *scales, *model.f_to_idxBl_or_fhat(x.detach(), to_fhat=True)]

    lockstep(
        lambda: doubles.ScaleQuantizer(K, D, znorm, v_patch_nums=(1, 2, 4, SIDE)),
        image, call, "VectorQuantizer2", look, levels=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    "ours, theirs, call",
    [
        (lambda: taming.VectorQuantizer2(K, D, 0.25), lambda: doubles.VectorQuantizer2(K, D, 0.25), image),
        (lambda: rosinality.Quantize(D, K), lambda: doubles.Quantize(D, K), lambda s: image(s).movedim(1, -1)),
        (lambda: unixpickle.VQ(D, K), lambda: doubles.VQ(D, K), image),
        (
            lambda: var.VectorQuantizer2(K, D, True, v_patch_nums=(1, 2, SIDE)),
            lambda: doubles.ScaleQuantizer(K, D, True, v_patch_nums=(1, 2, SIDE)),
            image,
        ),
    ],
    ids=["taming", "rosinality", "unixpickle", "var"],
)
def test_modules_take_the_peers_state(ours, theirs, call):
    a, b = theirs().eval(), ours().eval()
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    results = zip(flatten(a(call(0))), flatten(b(call(0))), strict=True)
    for x, y in results:
        if x is not None:
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share, n_keys", [(1, 2), (4, 8), (0, 6)])
def test_var_shares_its_refinements(share, n_keys):
    made = var.VectorQuantizer2(K, D, False, v_patch_nums=(1, 2, SIDE), share_quant_resi=share)
    assert sum(name.startswith("quant_resi.") for name in made.state_dict()) == n_keys
    assert made(image(0), ret_usages=True)[1] == [0.0, 0.0, 0.0]
