"""VQVAE and VQVAE2: shapes, exact ids, losses, refused arguments."""

import pytest
import torch

import fastvq.ops
from fastvq.models import VQVAE, VQVAE2
from tests.support.models.small import pictures, small_vqvae, small_vqvae2


@pytest.mark.parametrize("downsample", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_one_level_makes_one_map_of_the_downsampled_size(downsample, channels):
    model = small_vqvae(channels=channels, downsample=downsample)
    image = torch.rand(3, channels, 24, 40)
    ids = model.encode(image)
    assert ids.shape == (3, 24 // downsample, 40 // downsample) and ids.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < 16
    assert model.decode(ids).shape == image.shape


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_each_level_has_twice_the_sides_of_the_one_above(levels):
    model = small_vqvae2(levels=levels, codes=[16, 24, 8][:levels])
    image = pictures(2, 32)
    maps = model.encode(image)
    assert [list(m.shape) for m in maps] == [[2, s, s] for s in (4, 8, 16)[3 - levels :]]
    assert model.decode(maps).shape == image.shape
    out = model(image)
    assert out.perplexity.shape == out.used.shape == (levels,)


def test_ids_are_the_nearest_codes_of_the_encoders_vectors():
    model = small_vqvae().eval()
    image = pictures(4)
    vectors = model.before[0](model.encoders[0](image)).movedim(1, -1)
    codebook = model.quantizers[0].codebook.reshape(16, 4)
    expected = fastvq.ops.nearest(vectors, codebook, backend="reference")
    assert torch.equal(model.encode(image), expected)


@pytest.mark.parametrize("make", [small_vqvae, small_vqvae2])
def test_forward_agrees_with_encode_and_decode(make):
    model = make().eval()
    image = pictures(4)
    out = model(image)
    maps = model.encode_maps(image)
    assert all(torch.equal(a, b) for a, b in zip(out.maps, maps, strict=True))
    # The straight-through sum x + (c - x) may round where the stored code does not.
    assert torch.allclose(out.reconstruction, model.decode_maps(maps), atol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_losses_add_up_and_reach_every_weight(loss):
    model = small_vqvae2(loss=loss)
    image = pictures(4)
    out = model(image)
    difference = out.reconstruction - image
    expected = difference.square().mean() if loss == "mse" else difference.abs().mean()
    assert torch.allclose(out.reconstruction_loss, expected)
    assert torch.equal(out.loss, out.reconstruction_loss + out.commitment_loss)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_perplexity_and_use_are_those_of_the_ids():
    out = small_vqvae()(pictures(8))
    counts = torch.bincount(out.maps[0].flatten(), minlength=16).double()
    share = counts / counts.sum()
    assert out.used[0] == (counts > 0).float().mean()
    assert out.perplexity[0].item() == pytest.approx(float(torch.exp(-torch.xlogy(share, share).sum())), rel=1e-5)


@pytest.mark.parametrize("kind", ["residual", "grouped"])
def test_several_ids_a_position(kind):
    model = small_vqvae(quantizer=kind, depth=2)
    image = pictures(2)
    ids = model.encode(image)
    assert ids.shape == (2, 4, 4, 2)
    assert model.decode(ids).shape == image.shape
    assert model(image).maps[0].shape == ids.shape


def test_autocast_changes_no_codebook_and_keeps_it_in_float32():
    model = small_vqvae().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = model(pictures(2))
        model.decode(model.encode(pictures(2)))
    assert out.loss.dtype == torch.float32
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 16, 4), "in_channels must be at least 1"),
        ((1, 6, 16, 4), "hidden must be a multiple of 4"),
        ((1, 8, 0, 4), "n_codes must be at least 1"),
        ((1, 8, 16, 4, 3), "downsample must be 2, 4 or 8"),
    ],
)
def test_arguments_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQVAE(*arguments)


def test_pictures_and_maps_that_are_refused():
    model = small_vqvae2()
    for image, message in (
        (torch.rand(1, 2, 16, 16), r"image must be \[B, 1, H, W\]"),
        (torch.rand(1, 1, 16, 18), "multiples of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(image)
    top, bottom = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 8, 8, dtype=torch.int64)
    for maps, message in (
        ([top], "maps must be 2"),
        ([top, top], r"maps\[1\] must be \[8, 8\]"),
        ([top, bottom + 16], r"maps\[1\] must be in \[0, 16\), got 16 at row"),
        ([top, bottom - 1], r"maps\[1\] must be in \[0, 16\), got -1 at row"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode(maps)
    for wrong in (bottom.bool(), bottom.float(), bottom.tolist()):
        with pytest.raises(TypeError, match=r"maps\[1\] must be an integer tensor"):
            model.decode([top, wrong])
    decoded = model.decode([top + 3, bottom + 5])
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model.decode([(top + 3).to(dtype), (bottom + 5).to(dtype)]), decoded)
    for image, message in (
        (torch.zeros(1, 1, 16, 16, dtype=torch.uint8), "image must be floating-point, got torch.uint8; scale it"),
        ([[0.0]], "image must be a torch.Tensor, got list"),
    ):
        for call in (model, model.encode):
            with pytest.raises(TypeError, match=message):
                call(image)
    with pytest.raises(ValueError, match="one a level"):
        VQVAE2(1, 8, [16], 4, levels=2)
    with pytest.raises(ValueError, match="quantizer must be one of"):
        VQVAE(1, 8, 16, 4, quantizer="product")
