"""Edits: the ids and pixels that change, those that do not, and the weights of drafts."""

import pytest
import torch

from fastvq.models import Prior, edit
from fastvq.models.editing import positions, region_mask
from tests.support.models.small import pictures, small_vqvae, small_vqvae2

BOX = (40, 24, 52, 40)


def large(make, **options):
    """A model whose codes are means of its vectors, so that different pictures get different ids."""
    model = make(channels=3, kmeans_init=True, **options)
    image = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    model(image)
    return model.eval(), image


@pytest.mark.parametrize("make", [small_vqvae, small_vqvae2])
@pytest.mark.parametrize("way", ["codes", "source", "swap", "prior"])
def test_beyond_the_reach_nothing_changes_at_all(make, way):
    model, image = large(make)
    other = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(4)
    options = {
        "codes": dict(codes=[7] * model.levels),
        "source": dict(source=other),
        "swap": dict(swap={k: (k + 1) % 16 for k in range(16)}),
        "prior": dict(prior=small_priors(model), labels=1, n_candidates=2, generator=torch.Generator().manual_seed(5)),
    }
    done = edit(model, image, BOX, **options[way])
    difference = (done.image - done.reconstruction).abs().amax(1)
    assert done.reach.any() and not done.reach.all()
    assert (difference[~done.reach] == 0).all()
    assert torch.equal(done.reconstruction, model.decode_maps(model.encode_maps(image)))
    assert (done.inside_change > 0).all()


@pytest.mark.parametrize("make", [small_vqvae, small_vqvae2])
def test_the_reach_is_tight(make):
    """When the code of one position changes, exactly the pixels in its reach change."""
    model, image = make(channels=3).double().eval(), torch.rand(2, 3, 96, 96, dtype=torch.float64)
    maps = model.encode_maps(image)
    for level in range(model.levels):
        masks = [torch.zeros_like(ids, dtype=torch.bool) for ids in maps]
        row, column = (side // 2 for side in maps[level].shape[1:])
        masks[level][:, row, column] = True
        reached = torch.zeros(2, 96, 96, dtype=torch.bool)
        for shift in range(1, 16):
            changed = [torch.where(m, (ids + shift) % 16, ids) for m, ids in zip(masks, maps, strict=True)]
            reached |= (model.decode_maps(changed) != model.decode_maps(maps)).any(1)
        assert torch.equal(reached, model.reach(masks))


def test_a_transplant_takes_the_others_codes_in_the_region_alone():
    model, image = large(small_vqvae2)
    other = image.flip(0)
    done = edit(model, image, BOX, source=other)
    before, theirs = model.encode_maps(image), model.encode_maps(other)
    mask = region_mask(BOX, image)
    for level, ids in enumerate(done.maps):
        where = positions(mask, model.strides[level])
        assert torch.equal(ids[where], theirs[level][where])
        assert torch.equal(ids[~where], before[level][~where])
        assert torch.equal(done.changed[level], ids != before[level])


def test_a_picture_transplanted_into_itself_stays_as_it_is():
    model, image = large(small_vqvae2)
    done = edit(model, image, BOX, source=image)
    assert torch.equal(done.image, done.reconstruction)
    assert not any(c.any() for c in done.changed) and not done.reach.any()
    assert (done.inside_change == 0).all() and (done.outside_change == 0).all()


def test_codes_are_set_on_the_levels_that_are_given():
    model, image = large(small_vqvae2)
    done = edit(model, image, BOX, codes=[None, 3])
    before = model.encode_maps(image)
    assert torch.equal(done.maps[0], before[0])
    where = positions(region_mask(BOX, image), model.strides[1])
    assert (done.maps[1][where] == 3).all() and torch.equal(done.maps[1][~where], before[1][~where])
    whole = edit(model, image, BOX, codes=[before[0], before[1].flip(0)])
    assert torch.equal(whole.maps[1][where], before[1].flip(0)[where])


def test_a_swap_exchanges_two_codes():
    model, image = large(small_vqvae)
    before = model.encode(image)
    where = positions(region_mask(BOX, image), 4)
    a, b = (
        (int(v) for v in before[where].unique()[:2])
        if before[where].unique().numel() > 1
        else (int(before[where][0]), 0)
    )
    done = edit(model, image, BOX, swap={a: b, b: a})
    expected = torch.where(before == a, b, torch.where(before == b, a, before))
    assert torch.equal(done.maps[0], torch.where(where, expected, before))


@pytest.mark.parametrize("make", [small_vqvae, small_vqvae2])
def test_an_edit_goes_on_from_the_maps_of_another(make):
    model, image = large(make)
    first = edit(model, image, BOX, codes=[7] * model.levels)
    second = edit(model, image[:1].expand(2, -1, -1, -1), (0, 0, 8, 8), maps=[m[:1] for m in first.maps],
                  codes=[3] * model.levels)  # fmt: skip
    assert torch.equal(second.reconstruction, model.decode_maps([m[:1].expand(2, -1, -1) for m in first.maps]))
    for level, ids in enumerate(second.maps):
        where = positions(region_mask((0, 0, 8, 8), image), model.strides[level])
        assert (ids[where] == 3).all() and torch.equal(ids[0][~where[0]], first.maps[level][0][~where[0]])
    again = edit(model, image, BOX, codes=[7] * model.levels, maps=model.encode_maps(image))
    assert torch.equal(again.image, first.image)
    for maps in ([m[:, : m.shape[1] // 2] for m in first.maps], [m.repeat(2, 1, 1) for m in first.maps]):
        with pytest.raises(ValueError, match="maps must be 1 or 2"):
            edit(model, image, BOX, maps=maps, codes=[1] * model.levels)


@pytest.mark.parametrize("box", [True, False])
def test_regions_become_the_positions_that_hold_their_pixels(box):
    image = pictures(2)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[3:5, 8:9] = True
    where = positions(region_mask((8, 3, 9, 5) if box else mask, image), 4)
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[:, 0:2, 2] = True
    assert torch.equal(where, expected)


@pytest.mark.parametrize("width", [1, 3])
def test_blending_puts_the_original_back(width):
    model, image = large(small_vqvae)
    plain = edit(model, image, BOX, codes=5)
    done = edit(model, image, BOX, codes=5, blend=width)
    x0, y0, x1, y1 = BOX
    assert torch.equal(done.image[..., y0:y1, x0:x1], plain.image[..., y0:y1, x0:x1])
    beyond = ~region_mask((x0 - width + 1, y0 - width + 1, x1 + width - 1, y1 + width - 1), image)
    assert torch.equal(done.image.movedim(1, -1)[beyond], image.movedim(1, -1)[beyond])
    assert torch.equal(done.outside_change, plain.outside_change)


def small_priors(model, **options):
    return [
        Prior(k, 8, 2, 4, above=[(16, 1 << (level - i)) for i in range(level)], **options)
        for level, k in enumerate(model.n_codes)
    ]


def test_a_prior_redraws_the_region_alone_and_the_seed_decides():
    model = small_vqvae2().eval()
    image = pictures(2)
    torch.manual_seed(3)
    priors = small_priors(model)
    done, again = (
        edit(model, image, (4, 4, 12, 12), prior=priors, labels=2, n_candidates=3,
             generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )  # fmt: skip
    before = model.encode_maps(image)
    for level, ids in enumerate(done.maps):
        where = positions(region_mask((4, 4, 12, 12), image), model.strides[level])
        assert torch.equal(ids[~where], before[level][~where])
        assert torch.equal(ids, again.maps[level])


def test_drafts_are_weighed_by_the_ids_that_follow():
    """One unknown position of a 2x1 map: with many drafts its law is the posterior p(a | b), not the prior p(a)."""
    model = small_vqvae(downsample=8).eval()
    torch.manual_seed(0)
    prior = Prior(16, 8, 2)
    with torch.no_grad():  # so that the second id depends a lot on the first
        for p in prior.parameters():
            p.mul_(3)
    image = torch.rand(1, 1, 8, 16).expand(400, -1, -1, -1)
    second = model.encode(image)[0, 0, 1]
    pairs = torch.stack([torch.arange(16), second.expand(16)], 1)[:, None]  # [16, 1, 2]
    joint = prior.log_prob(pairs).double().flatten(1)
    posterior = joint.sum(1).softmax(0)
    done = edit(model, image, (0, 0, 8, 8), prior=prior, n_candidates=64, generator=torch.Generator().manual_seed(0))
    drawn = torch.bincount(done.maps[0][:, 0, 0], minlength=16).double() / 400
    # Total variation of 400 draws from 16 outcomes is about sqrt(16 / 400) / 2 = 0.1; drafts' own noise is smaller.
    assert (drawn - posterior).abs().sum() / 2 < 0.15
    assert (done.maps[0][:, 0, 1] == second).all()


def test_edits_that_are_refused():
    model = small_vqvae().eval()
    image = pictures(1)
    for options, message in (
        (dict(region=(0, 0, 4, 4)), "exactly one of codes, source, swap, prior"),
        (dict(region=(0, 0, 4, 4), codes=1, swap={1: 2}), "exactly one"),
        (dict(region=(0, 0, 0, 4), codes=1), "region as a box"),
        (dict(region=(0, 0, 17, 4), codes=1), "x1 <= 16"),
        (dict(region=torch.zeros(16, 16, dtype=torch.bool), codes=1), "at least one pixel"),
        (dict(region=torch.ones(4, 4, dtype=torch.bool), codes=1), "region as a mask"),
        (dict(region=(0, 0, 4, 4), codes=16), r"ids in 0 \.\. 15"),
        (dict(region=(0, 0, 4, 4), codes=[1, 2]), "one entry a level"),
        (dict(region=(0, 0, 4, 4), swap={1: 99}), r"ids in 0 \.\. 15"),
        (dict(region=(0, 0, 4, 4), source=pictures(1, 32)), "source must be"),
        (dict(region=(0, 0, 4, 4), prior=[]), "priors must be 1"),
        (dict(region=(0, 0, 4, 4), codes=1, n_candidates=0), "n_candidates"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(model, image, **options)
