"""vector-quantize-pytorch, patched and unpatched."""

import copy

import pytest
import torch
from torch.nn import functional as F

import fastvq
from tests.support.compat.lockstep import STEPS, Lookup, lockstep
from tests.support.compat.peers import peer
from tests.support.tolerance import assert_within, gamma

B, N, D, K = 4, 48, 16, 24


@pytest.fixture(scope="module")
def vqp():
    return peer("vector_quantize_pytorch")


def batch(step: int) -> torch.Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(step))


def look(module, x, outputs, state) -> Lookup:
    """A lookup of VectorQuantize with one codebook and no projection."""
    rows, indices = x.reshape(-1, x.shape[-1]), outputs[1]
    codes, metric = state["_codebook.embed"][0], "euclidean"
    if module.use_cosine_sim:
        rows, metric = F.normalize(rows, eps=1e-6), "dot"
    real = indices.flatten() >= 0
    return Lookup(rows[real], codes, indices.flatten()[real], metric)


def outputs(model, x):
    return model(x)


VARIANTS = {
    "rotation": {},
    "straight through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "orthogonal": {"orthogonal_reg_weight": 0.1},
    "dead codes": {"threshold_ema_dead_code": 2},
    "manual update": {"manual_ema_update": True},
    "no commitment": {"commitment_weight": 0.0},
    "update v": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.5, "rotation_trick": False},
    "unrouted": {"route_gradients_to_input": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_fifty_steps(vqp, name):
    lockstep(lambda: vqp.VectorQuantize(D, K, **VARIANTS[name]), batch, outputs, "VectorQuantize", look)


@pytest.mark.parametrize("masked", ["mask", "lens"])
@pytest.mark.parametrize("cosine", [False, True])
def test_masks(vqp, masked, cosine):
    lens = torch.tensor([48, 1, 17, 30])
    given = {"lens": lens} if masked == "lens" else {"mask": torch.arange(N) < lens[:, None]}
    lockstep(
        lambda: vqp.VectorQuantize(D, K, use_cosine_sim=cosine),
        batch, lambda model, x: model(x, **given), "VectorQuantize", look,
    )  # fmt: skip


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_heads(vqp, separate, cosine):
    heads = 2

    def look_at_heads(module, x, out, state):
        # [H, B N, D]; the second head stands for all, whose results are compared anyway.
        split = module.project_in(x).detach().unflatten(-1, (heads, -1)).movedim(2, 0).flatten(1, 2)
        split = F.normalize(split, dim=-1, eps=1e-6) if cosine else split
        head = 1 if separate else 0
        return Lookup(
            split[1], state["_codebook.embed"][head], out[1][..., 1].flatten(), "dot" if cosine else "euclidean"
        )

    def make():
        return vqp.VectorQuantize(
            D, K, heads=heads, codebook_dim=8, separate_codebook_per_head=separate, use_cosine_sim=cosine
        )

    lockstep(make, batch, outputs, "VectorQuantize", look_at_heads)


@pytest.mark.parametrize("layout", ["image", "video", "channel first", "one vector"])
def test_layouts(vqp, layout):
    shape = {"image": (2, D, 6, 8), "video": (2, D, 2, 4, 6), "channel first": (B, D, N), "one vector": (N, D)}[layout]
    options = {"image": {"accept_image_fmap": True}, "video": {"accept_3d_fmap": True}}.get(layout, {})
    options = {"channel_last": False} if layout == "channel first" else options

    def look_at_map(module, x, out, state):
        rows = x if layout == "one vector" else x.movedim(1, -1).reshape(-1, D)
        return Lookup(rows, state["_codebook.embed"][0], out[1].flatten())

    lockstep(
        lambda: vqp.VectorQuantize(D, K, **options),
        lambda step: torch.randn(shape, generator=torch.Generator().manual_seed(step)),
        outputs, "VectorQuantize", look_at_map,
    )  # fmt: skip


RESIDUAL = {
    "plain": {},
    "dropout": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "dropout in twos": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2},
    "shared": {"shared_codebook": True},
    "gradients between levels": {"quant_grad_frac": 0.1},
    "projected": {"codebook_dim": 8},
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual(vqp, name):
    lockstep(
        lambda: vqp.ResidualVQ(dim=D, codebook_size=K, num_quantizers=4, **RESIDUAL[name]),
        batch, outputs, "VectorQuantize", look, levels=4,
    )  # fmt: skip


def test_residual_masked_and_with_all_codes(vqp):
    mask = torch.arange(N) < torch.tensor([48, 1, 17, 30])[:, None]
    for given in ({"mask": mask}, {"return_all_codes": True}):
        lockstep(
            lambda: vqp.ResidualVQ(dim=D, codebook_size=K, num_quantizers=3),
            batch, lambda model, x, given=given: model(x, **given), "VectorQuantize", look, levels=3,
        )  # fmt: skip


def test_grouped(vqp):
    lockstep(
        lambda: vqp.GroupedResidualVQ(dim=D, codebook_size=K, num_quantizers=2, groups=2),
        batch, outputs, "VectorQuantize", look, levels=2,
    )  # fmt: skip


@pytest.mark.parametrize("rotation", [False, True])
def test_sim_vq(vqp, rotation):
    def look_at_codes(module, x, out, state):
        return Lookup(x.movedim(1, -1).reshape(-1, D), module.codebook.detach(), out[1].flatten())

    lockstep(
        lambda: vqp.SimVQ(D, K, channel_first=True, rotation_trick=rotation),
        lambda step: torch.randn(2, D, 6, 8, generator=torch.Generator().manual_seed(step)),
        outputs, "SimVQ", look_at_codes,
    )  # fmt: skip


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_init(vqp, cosine):
    def look_after(module, x, out, state):
        return look(module, x, out, module.state_dict())

    lockstep(
        lambda: vqp.VectorQuantize(D, K, kmeans_init=True, use_cosine_sim=cosine, threshold_ema_dead_code=1),
        # From far apart clusters, so that ten iterations of k-means meet no tie. The first step initialises.
        clustered, outputs, "VectorQuantize", look_after, steps=1, train=False,
    )  # fmt: skip


def clustered(step: int) -> torch.Tensor:
    """Vectors about K centres so far apart that no rounding decides an index."""
    g = torch.Generator().manual_seed(step)
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(99)) * 8
    return centres[torch.randint(K, (B, N), generator=g)] + torch.randn(B, N, D, generator=g) / 8


@pytest.mark.parametrize("cosine", [False, True])
def test_running_freely(vqp, cosine):
    """Fifty steps without exchange: the same indices, and buffers that drift by rounding alone."""
    torch.manual_seed(0)
    theirs = vqp.VectorQuantize(D, K, use_cosine_sim=cosine)
    theirs._codebook.embed.copy_(theirs._codebook.transform_input(clustered(0)[0, :K])[None])
    ours = copy.deepcopy(theirs)
    fastvq.patch(ours)
    for step in range(STEPS):
        a, b = theirs(clustered(step)), ours(clustered(step))
        assert torch.equal(a[1], b[1])
    # An average forgets at the rate it is fed: the geometric series of one step's error, 1 / (1 - decay) = 5 of them.
    rows = B * N
    bound = 5 * gamma(rows + 2 * K + 60, torch.float32)
    for name, value in theirs.state_dict().items():
        largest = float(value.float().abs().max()) * (rows if name.endswith("avg") else 1)
        assert_within(ours.state_dict()[name], value, bound * largest if value.is_floating_point() else 0)


def test_eval_is_identical(vqp):
    for model in (vqp.VectorQuantize(D, K), vqp.ResidualVQ(dim=D, codebook_size=K, num_quantizers=3)):
        theirs, ours = model.eval(), copy.deepcopy(model).eval()
        fastvq.patch(ours)
        with torch.no_grad():
            for a, b in zip(theirs(batch(1)), ours(batch(1)), strict=True):
                assert torch.equal(a, b)


FALL_BACK = {
    "stochastic": ({"stochastic_sample_codes": True}, {}),
    "gumbel": ({"straight_through": True, "rotation_trick": False}, {}),
    "affine": ({"affine_param": True}, {}),
    "cross entropy": ({"commitment_use_cross_entropy_loss": True}, {}),
    "diversity": ({"codebook_diversity_loss_weight": 0.1}, {}),
    "topk": ({}, {"topk": 3}),
    "indices": ({}, {"indices": torch.zeros(B, N, dtype=torch.long)}),
}


@pytest.mark.parametrize("case", FALL_BACK.values(), ids=FALL_BACK)
def test_options_not_covered_are_the_originals_bit_for_bit(vqp, case):
    options, given = case
    torch.manual_seed(0)
    theirs = vqp.VectorQuantize(D, K, **options)
    ours = copy.deepcopy(theirs)
    report = fastvq.patch(ours)
    always = options.keys() & {"stochastic_sample_codes", "straight_through", "affine_param"}
    assert bool(report) != bool(always) and len(report.left) == 2 * len(always)
    assert always or bool(report.replaced[0].limits) == bool(options)
    for step in range(3):
        results = []
        for model in (theirs, ours):
            torch.manual_seed(step)
            results.append(model(batch(step), **given))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_update_indices_counts_as_forward_does(vqp):
    torch.manual_seed(0)
    one = vqp.VectorQuantize(D, K)
    fastvq.patch(one)
    other = copy.deepcopy(one)
    _, indices, _ = one(batch(0))
    other.update_indices(batch(0), indices)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
