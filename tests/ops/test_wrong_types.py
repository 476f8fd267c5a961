"""Arguments of a wrong type, on every public function: the op, the argument, what was expected and what came."""

import numpy as np
import pytest
import torch

import fastvq
from fastvq import models, nn, ops

X, CODES, IDS = torch.randn(6, 4), torch.randn(5, 4), torch.zeros(6, dtype=torch.int64)
IMAGE, WEIGHT = torch.randn(1, 2, 4, 4), torch.randn(4, 2, 3, 3)
SUMS, COUNTS, SIZE = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64), torch.ones(5)
VQ, PICTURE, BOX = models.VQVAE(1, 8, 4, 4), torch.randn(1, 1, 16, 16), (0, 0, 8, 8)
PRIOR = models.PixelCNN(4, 2, 1, first_kernel_size=3)
WEIGHTS = [torch.zeros(s) for s in ((4, 2), (4, 2, 3, 3), 4, (4, 2, 1, 1), 4, (4, 2, 1, 3), 4, (2, 2, 1, 1), 2,
           (2, 2, 1, 1), 2, (4, 2, 1, 1), 4)]  # fmt: skip
STATE, STATE_IDS = ops.pixelcnn_start(WEIGHTS, [3], (1, 2, 2)), torch.zeros(1, 2, 2, dtype=torch.int64)
NESTED = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])


def _update(**changed):
    given = {"sums": SUMS, "counts": COUNTS, "decay": 0.9, **changed}
    return ops.ema_update_(CODES.clone(), CODES.clone(), SIZE.clone(), **given)


def _replace(**changed):
    return ops.replace_dead_codes_(CODES.clone(), CODES.clone(), SIZE.clone(), X, **{"threshold": 1.0, **changed})


WITH_BACKEND = {
    "nearest": lambda b: ops.nearest(X, CODES, backend=b),
    "quantize": lambda b: ops.quantize(X, CODES, backend=b),
    "vq_step": lambda b: ops.vq_step(X, CODES, backend=b),
    "residual_quantize": lambda b: ops.residual_quantize(X, CODES[None], backend=b),
    "code_statistics": lambda b: ops.code_statistics(X, IDS, 5, backend=b),
    "ema_update_": lambda b: _update(backend=b),
    "replace_dead_codes_": lambda b: _replace(backend=b),
    "masked_conv2d": lambda b: ops.masked_conv2d(IMAGE, WEIGHT, backend=b),
    "gated_masked_conv2d": lambda b: ops.gated_masked_conv2d(IMAGE, WEIGHT, backend=b),
    "pack_codebook": lambda b: ops.pack_codebook(CODES, backend=b),
    "pixelcnn_start": lambda b: ops.pixelcnn_start(WEIGHTS, [3], (1, 2, 2), backend=b),
}


@pytest.mark.parametrize("op", WITH_BACKEND)
@pytest.mark.parametrize("backend", [3, b"cpu", torch.zeros(1)])
def test_backend(op, backend):
    with pytest.raises(TypeError, match=rf"fastvq.ops.{op}: backend must be the name of a backend or None, got "):
        WITH_BACKEND[op](backend)


INTEGERS = {
    "ops.code_statistics: n_codes": lambda n: ops.code_statistics(X, IDS, n),
    "ops.code_statistics: n_heads": lambda n: ops.code_statistics(X, IDS, 5, n_heads=n),
    "ops.residual_quantize: n_levels": lambda n: ops.residual_quantize(X, CODES[None], n_levels=n),
    "ops.masked_conv2d: colours": lambda n: ops.masked_conv2d(IMAGE, WEIGHT, colours=n),
    "nn.VectorQuantizer: dim": lambda n: nn.VectorQuantizer(n, 8),
    "nn.VectorQuantizer: n_codes": lambda n: nn.VectorQuantizer(4, n),
    "nn.VectorQuantizer: heads": lambda n: nn.VectorQuantizer(4, 8, heads=n),
    "nn.ResidualVQ: n_levels": lambda n: nn.ResidualVQ(4, 8, n),
    "nn.MaskedConv2d: in_channels": lambda n: nn.MaskedConv2d(n, 4, 3),
    "nn.MaskedConv2d: colours": lambda n: nn.MaskedConv2d(3, 3, 3, colours=n),
    "nn.GroupedVQ: n_groups": lambda n: nn.GroupedVQ(4, 8, n),
    "nn.GroupedVQ: n_codes": lambda n: nn.GroupedVQ(4, n, 2),
    "kmeans: n_codes": lambda n: fastvq.kmeans(X, n),
    "kmeans: n_iter": lambda n: fastvq.kmeans(X, 2, n_iter=n),
    "ops.pixelcnn_start: kernel_sizes\\[0\\]": lambda n: ops.pixelcnn_start(WEIGHTS, [n], (1, 2, 2)),
    "ops.pixelcnn_start: shape\\[1\\]": lambda n: ops.pixelcnn_start(WEIGHTS, [3], (1, n, 2)),
    "ops.pixelcnn_step: column": lambda n: ops.pixelcnn_step(STATE, STATE_IDS, 0, n),
    "models.PixelCNN: n_codes": lambda n: models.PixelCNN(n, 4, 1),
    "models.PixelCNN: n_classes": lambda n: models.PixelCNN(4, 4, 1, n),
    "models.PixelCNN: kernel_size": lambda n: models.PixelCNN(4, 4, 2, kernel_size=n),
    "models.PixelCNN.sample: shape\\[0\\]": lambda n: PRIOR.sample((n, 2, 2)),
    "models.PixelCNN.sample: top_k": lambda n: PRIOR.sample((1, 2, 2), top_k=n),
    "models.VQVAE: in_channels": lambda n: models.VQVAE(n, 8, 7, 4),
    "models.VQVAE: hidden": lambda n: models.VQVAE(1, n, 7, 4),
    "models.VQVAE: n_codes": lambda n: models.VQVAE(1, 8, n, 4),
    "models.VQVAE: downsample": lambda n: models.VQVAE(1, 8, 7, 4, n),
    "models.VQVAE: n_blocks": lambda n: models.VQVAE(1, 8, 7, 4, n_blocks=n),
    "models.VQVAE2: levels": lambda n: models.VQVAE2(1, 8, 7, 4, levels=n),
    "models.VQVAE2: n_codes\\[1\\]": lambda n: models.VQVAE2(1, 8, [7, n], 4),
    "models.edit: n_candidates": lambda n: models.edit(VQ, PICTURE, BOX, prior=PRIOR, n_candidates=n),
    "models.edit: region\\[3\\]": lambda n: models.edit(VQ, PICTURE, (0, 0, 8, n), prior=PRIOR),
    "models.VQVAE.generate: n": lambda n: models.VQVAE(1, 8, 7, 4).generate(n, priors=PRIOR, size=(16, 16)),
}


@pytest.mark.parametrize("place", INTEGERS)
def test_integers(place):
    for wrong in (3.0, "2", True, torch.tensor(2)):
        with pytest.raises(TypeError, match=f"fastvq.{place} must be an integer, got {type(wrong).__name__} "):
            INTEGERS[place](wrong)
    with pytest.raises(ValueError, match=f"fastvq.{place} must be below 2\\^63, got 9223372036854775808"):
        INTEGERS[place](2**63)


NUMBERS = {
    "ops.quantize: beta": lambda v: ops.quantize(X, CODES, beta=v),
    "ops.vq_step: beta": lambda v: ops.vq_step(X, CODES, beta=v),
    "ops.residual_quantize: beta": lambda v: ops.residual_quantize(X, CODES[None], beta=v),
    "ops.ema_update_: decay": lambda v: _update(decay=v),
    "ops.ema_update_: eps": lambda v: _update(eps=v),
    "ops.replace_dead_codes_: threshold": lambda v: _replace(threshold=v),
    "nn.VectorQuantizer: decay": lambda v: nn.VectorQuantizer(4, 8, decay=v),
    "nn.VectorQuantizer: eps": lambda v: nn.VectorQuantizer(4, 8, eps=v),
    "nn.ResidualVQ: commitment_weight": lambda v: nn.ResidualVQ(4, 8, 2, commitment_weight=v),
    "nn.VectorQuantizer: dead_code_threshold": lambda v: nn.VectorQuantizer(4, 8, dead_code_threshold=v),
    "kmeans: tolerance": lambda v: fastvq.kmeans(X, 2, tolerance=v),
    "models.PixelCNN.sample: temperature": lambda v: PRIOR.sample((1, 2, 2), temperature=v),
    "models.PixelCNN.sample: top_p": lambda v: PRIOR.sample((1, 2, 2), top_p=v),
}


@pytest.mark.parametrize("place", NUMBERS)
def test_numbers(place):
    for wrong in ("x", [0.5], 1j):
        with pytest.raises(TypeError, match=f"fastvq.{place} must be a number, got {type(wrong).__name__} "):
            NUMBERS[place](wrong)


@pytest.mark.parametrize("place", NUMBERS)
def test_numbers_that_are_none(place):
    """Tensors and arrays of several elements or of no memory, and integers that no float holds."""
    for wrong in (torch.zeros(2), np.zeros(2), torch.zeros((), device="meta"), torch.zeros(300, 300)):
        with pytest.raises(TypeError, match=f"fastvq.{place} must be a number, got {type(wrong).__name__} ") as raised:
            NUMBERS[place](wrong)
        assert len(str(raised.value)) < 220
    for wrong in (10**400, 10**5000):
        with pytest.raises(ValueError, match=f"fastvq.{place} must be a number that a float holds, got an integer of"):
            NUMBERS[place](wrong)


@pytest.mark.parametrize("place", [p for p in NUMBERS if p.endswith(("beta", "commitment_weight"))])
def test_weights_of_losses(place):
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=f"fastvq.{place} must be finite and 0 or more, got {wrong}"):
            NUMBERS[place](wrong)


def test_arrays_for_options_and_integers():
    for place, call in INTEGERS.items():
        with pytest.raises(TypeError, match=f"fastvq.{place} must be an integer, got ndarray"):
            call(np.array([5, 6]))
        with pytest.raises(ValueError, match=f"fastvq.{place} must be below 2\\^63, got an integer of"):
            call(10**5000)
    array, packed = np.array(["dot", "cosine"]), ops.pack_codebook(CODES)
    for message, call in (
        ("nearest: metric must be one of", lambda: ops.nearest(X, CODES, metric=array)),
        ("quantize: estimator must be one of", lambda: ops.quantize(X, CODES, estimator=array)),
        ("vq_step: precision must be one of", lambda: ops.vq_step(X, CODES, precision=array)),
        ("nearest: the codebook was packed for metric", lambda: ops.nearest(X, packed, metric=array)),
        ("ema_update_: smoothing must be one of", lambda: _update(smoothing=array)),
    ):
        with pytest.raises(ValueError, match=f"fastvq.ops.{message}"):
            call()


def test_sparse_and_nested_arguments():
    mask, counts = torch.ones(6, dtype=torch.bool).to_sparse(), COUNTS.to_sparse()
    nested = torch.nested.nested_tensor([torch.zeros(3, dtype=torch.int64)])
    for message, call in (
        ("quantize: mask", lambda: ops.quantize(X, CODES, mask=mask)),
        ("code_statistics: mask", lambda: ops.code_statistics(X, IDS, 5, mask=mask)),
        ("code_statistics: indices", lambda: ops.code_statistics(X, IDS.to_sparse(), 5)),
        ("code_statistics: indices", lambda: ops.code_statistics(X, nested, 5)),
        ("ema_update_: counts", lambda: _update(counts=counts)),
        ("residual_quantize: codebooks", lambda: ops.residual_quantize(X, NESTED)),
        ("residual_quantize: codebooks", lambda: ops.residual_quantize(X, CODES[None].to_sparse())),
    ):
        with pytest.raises(TypeError, match=f"fastvq.ops.{message} must be a dense tensor, got "):
            call()
    with pytest.raises(
        TypeError, match=r"fastvq.ops.residual_quantize: codebooks\[1\] must be a torch.Tensor, got None"
    ):
        ops.residual_quantize(X, [CODES, None])


def test_sizes_beyond_any_memory():
    with pytest.raises(ValueError, match=r"fastvq.ops.code_statistics: n_codes must leave sums \[K, D\] below 2\^63"):
        ops.code_statistics(X, IDS, 2**62)
    with pytest.raises(ValueError, match=r"fastvq.models.PixelCNN.sample: shape must leave the ids below 2\^63 bytes"):
        PRIOR.sample((2**31,) * 3)


def test_counts_and_nested_tensors():
    with pytest.raises(TypeError, match=r"fastvq.ops.ema_update_: counts must be an int64 tensor, got NoneType"):
        _update(counts=None)
    for op, call in (
        ("nearest", lambda: ops.nearest(NESTED, CODES)),
        ("quantize", lambda: ops.quantize(NESTED, CODES)),
        ("code_statistics", lambda: ops.code_statistics(NESTED, IDS, 5)),
        ("masked_conv2d", lambda: ops.masked_conv2d(NESTED, WEIGHT)),
    ):
        with pytest.raises(TypeError, match=f"fastvq.ops.{op}: x must be a dense tensor, got a nested one; pad it"):
            call()


def test_sequences_and_tensors():
    for call, message in (
        (lambda: PRIOR.sample(None), "models.PixelCNN.sample: shape must be a sequence of integers, got NoneType"),
        (lambda: PRIOR.sample("222"), "models.PixelCNN.sample: shape must be a sequence of integers, got str"),
        (lambda: PRIOR.sample((1, 2, 2), known=[1]), "models.PixelCNN.sample: known must be torch.int64"),
        (lambda: ops.pixelcnn_start(None, [3], (1, 2, 2)), "ops.pixelcnn_start: weights must be a sequence of tensors"),
        (
            lambda: ops.pixelcnn_start([None], [3], (1, 2, 2)),
            r"ops.pixelcnn_start: weights\[0\] must be a torch",
        ),
        (lambda: ops.pixelcnn_start(WEIGHTS, 3, (1, 2, 2)), "ops.pixelcnn_start: kernel_sizes must be a sequence"),
        (lambda: ops.pixelcnn_start(WEIGHTS, [3], (1, 2, 2), condition=1.0), "ops.pixelcnn_start: condition must be a"),
        (lambda: ops.pixelcnn_step(None, STATE_IDS, 0, 0), "ops.pixelcnn_step: state must be what pixelcnn_start"),
        (lambda: ops.pixelcnn_step(STATE, [0], 0, 0), "ops.pixelcnn_step: ids must be int64"),
        (lambda: ops.pack_codebook(None), "ops.pack_codebook: codebook must be a torch.Tensor, got NoneType"),
        (lambda: ops.pack_codebook(NESTED), "ops.pack_codebook: codebook must be a dense tensor, got a nested one"),
        (lambda: fastvq.kmeans(NESTED, 2), "kmeans: data must be a dense tensor, got a nested one"),
        (lambda: fastvq.kmeans([1.0], 2), "kmeans: data must be a tensor"),
        (lambda: fastvq.kmeans(lambda: 3, 2), r"kmeans: data\(\) must return an iterator over batches"),
        (lambda: fastvq.kmeans(X, 2, generator=3), "kmeans: generator must be a torch.Generator or None, got int"),
        (lambda: _replace(generator=3), "ops.replace_dead_codes_: generator must be a torch.Generator or None"),
        (lambda: PRIOR.sample((1, 2, 2), generator=3), "models.PixelCNN.sample: generator must be a torch.Generator"),
        (lambda: ops.residual_quantize(X, None), "ops.residual_quantize: codebooks must be a tensor or a sequence"),
        (lambda: nn.update_codebooks(None), "nn.update_codebooks: model must be a torch.nn.Module, got NoneType"),
        (lambda: nn.MaskedConv2d(4, 8, 3, mask=3), "nn.MaskedConv2d: mask must be the name of a mask or a bool tensor"),
        (lambda: models.edit(None, PICTURE, BOX, prior=PRIOR), "models.edit: model must be a VQVAE or a VQVAE2"),
        (lambda: VQ.decode_maps(None), "models.VQVAE: maps must be a sequence, one a level, got NoneType"),
        (lambda: models.VQVAE(1, 8, None, 4), "models.VQVAE: n_codes must be an integer, got NoneType"),
        (lambda: models.VQVAE(1, 8, 7, 4)(NESTED), "models.VQVAE: image must be a dense tensor, got a nested one"),
        (lambda: PRIOR(NESTED), "models.PixelCNN: ids must be a dense tensor, got a nested one"),
    ):
        with pytest.raises(TypeError, match="fastvq." + message):
            call()


def test_kernel_sizes_of_modules():
    for make, wrong in ((nn.MaskedConv2d, "x"), (nn.MaskedConv2d, (3.0, 3)), (nn.GatedMaskedConv2d, 3.0)):
        with pytest.raises(ValueError, match=f"{make.__name__}: kernel_size must be one integer or two .* got "):
            make(4, 8, wrong)


def test_what_was_allowed_still_is():
    with fastvq.use_backend("reference"):
        ops.code_statistics(X, IDS, np.int64(5))
        ops.quantize(X, CODES, beta=np.float32(0.5))
        _update(decay=torch.tensor(0.5), eps=0)
