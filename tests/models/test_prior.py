"""Priors over the levels' maps, and new pictures sampled from them."""

import pytest
import torch

from fastvq.models import PixelCNN, Prior
from fastvq.models.prior import as_priors
from tests.support.models.small import small_vqvae, small_vqvae2


def two_levels(seed=0):
    torch.manual_seed(seed)
    return [Prior(16, 8, 2, 4, shape=(4, 4)), Prior(16, 8, 2, 4, above=[(16, 2)], shape=(8, 8))]


def maps(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(16, (batch, side, side), generator=generator) for side in (4, 8)]


def test_a_position_sees_what_is_before_it_and_all_that_is_above():
    top, bottom = maps(1)
    prior = two_levels()[1].double()
    labels = torch.tensor([1])
    before = prior(bottom, labels, [top])
    later = bottom.clone()
    later[0, 3, 5] = (later[0, 3, 5] + 1) % 16
    same = (prior(later, labels, [top]) == before).all(1)[0].flatten()
    assert same[: 3 * 8 + 6].all() and not same.all()
    above = top.clone()
    above[0, 3, 3] = (above[0, 3, 3] + 1) % 16
    # The last position of the top lies above the last four of the bottom, and within reach of all near it.
    assert not torch.equal(prior(bottom, labels, [above])[..., 0:8, :], before)
    assert not torch.equal(prior(bottom, torch.tensor([2]), [top]), before)


def test_log_prob_adds_up_to_the_loss():
    prior, (top, bottom), labels = two_levels()[1], maps(), torch.tensor([0, 3])
    log_prob = prior.log_prob(bottom, labels, [top])
    assert log_prob.shape == bottom.shape and (log_prob < 0).all()
    assert torch.allclose(prior.loss(bottom, labels, [top]), -log_prob.mean(), atol=1e-5)


def test_probabilities_of_all_maps_add_up_to_one():
    torch.manual_seed(0)
    prior = Prior(3, 8, 2)
    every = torch.cartesian_prod(*[torch.arange(3)] * 4).view(-1, 2, 2)
    assert prior.log_prob(every).double().flatten(1).sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_generated_pictures_follow_from_the_seed_and_the_label():
    model, priors = small_vqvae2().eval(), two_levels()

    def draw(seed, labels):
        return model.generate(3, labels, priors=priors, generator=torch.Generator().manual_seed(seed))

    assert draw(0, 1).shape == (3, 1, 16, 16)
    assert torch.equal(draw(0, 1), draw(0, [1, 1, 1]))
    assert not torch.equal(draw(0, 1), draw(1, 1))


def test_a_bare_pixelcnn_is_a_prior_of_the_top_level():
    model = small_vqvae().eval()
    pixelcnn = PixelCNN(16, 8, 2)
    assert model.generate(2, priors=pixelcnn, size=(16, 24)).shape == (2, 1, 16, 24)
    with pytest.raises(ValueError, match="size must be given"):
        model.generate(2, priors=pixelcnn)


def test_priors_that_are_refused():
    model, priors = small_vqvae2(), two_levels()
    with pytest.raises(ValueError, match="priors must be 2"):
        model.generate(1, 0, priors=priors[:1])
    with pytest.raises(TypeError, match=r"priors\[1\] must be a fastvq.models.Prior, got PixelCNN"):
        as_priors("here", [priors[0], PixelCNN(16, 8, 2)], 2)
    with pytest.raises(ValueError, match=r"labels must be \[2\]"):
        model.generate(2, [1, 2, 3], priors=priors)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\).* got 4 at row"):
        model.generate(2, 4, priors=priors)
    with pytest.raises(ValueError, match="size must be multiples of 4"):
        model.generate(2, 1, priors=priors, size=(16, 18))
    with pytest.raises(ValueError, match="above must be 1 maps"):
        priors[1](maps()[1], torch.tensor([0, 1]))
