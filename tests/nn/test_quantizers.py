"""The contract of the quantizer modules, checked on every variant."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastvq.nn import GroupedVQ, ResidualVQ, VectorQuantizer, update_codebooks
from fastvq.nn.codebook import LearnedCodebook
from fastvq.ops import Quantized
from tests.support.cases import generator

D = 12
VARIANTS = {
    "plain": lambda **o: VectorQuantizer(D, 31, **o),
    "cosine": lambda **o: VectorQuantizer(D, 31, metric="cosine", **o),
    "dot": lambda **o: VectorQuantizer(D, 31, metric="dot", **o),
    "rotation": lambda **o: VectorQuantizer(D, 31, estimator="rotation", **o),
    "learnable": lambda **o: VectorQuantizer(D, 31, learnable=True, **o),
    "learnable cosine": lambda **o: VectorQuantizer(D, 31, learnable=True, metric="cosine", **o),
    "kmeans": lambda **o: VectorQuantizer(D, 31, kmeans_init=True, **o),
    "dead": lambda **o: VectorQuantizer(D, 31, dead_code_threshold=1.0, **o),
    "projected": lambda **o: VectorQuantizer(D, 31, code_dim=3, **o),
    "heads": lambda **o: VectorQuantizer(D, 31, heads=3, **o),
    "separate heads": lambda **o: VectorQuantizer(
        D, 31, heads=3, separate_codebook_per_head=True, dead_code_threshold=1.0, kmeans_init=True, **o
    ),
    "projected heads": lambda **o: VectorQuantizer(
        D, 31, heads=2, code_dim=5, separate_codebook_per_head=True, metric="cosine", **o
    ),
    "channel first": lambda **o: VectorQuantizer(D, 31, channel_first=True, **o),
    "grouped": lambda **o: GroupedVQ(D, 31, 4, **o),
    "residual": lambda **o: ResidualVQ(D, 31, 3, **o),
    "residual shared": lambda **o: ResidualVQ(D, 31, 3, shared_codebook=True, dead_code_threshold=1.0, **o),
    "residual kmeans": lambda **o: ResidualVQ(D, 31, 3, kmeans_init=True, dead_code_threshold=1.0, **o),
    "residual projected": lambda **o: ResidualVQ(D, 31, 3, code_dim=5, channel_first=True, estimator="rotation", **o),
    "residual dropout": lambda **o: ResidualVQ(D, 31, 3, quantize_dropout=True, **o),
    "residual learnable": lambda **o: ResidualVQ(D, 31, 3, learnable=True, **o),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    torch.manual_seed(0)
    return VARIANTS[request.param]


def data(module, seed=0, n=3):
    shape = (n, D, 5, 7) if module.channel_first else (n, 5, 7, D)
    return torch.randn(shape, generator=generator(seed))


def mask_of(x, module, seed=9):
    shape = (x.shape[0], *x.shape[2:]) if module.channel_first else x.shape[:-1]
    return torch.rand(shape, generator=generator(seed)) < 0.7


def losses(q):
    return (q[2] + q[3]).sum()


def tensors(module):
    waiting = {n: t for n, t in vars(module).items() if n.startswith(("_counts", "pending_"))}  # not buffers
    named = {**dict(module.named_buffers()), **dict(module.named_parameters()), **waiting}
    return {name: t.detach().clone() for name, t in named.items()}


def equal(a, b):
    same = {
        name: torch.equal(a[name].nan_to_num(-1), b[name].nan_to_num(-1)) for name in a if a[name].is_floating_point()
    }
    same |= {name: torch.equal(a[name], b[name]) for name in a if not a[name].is_floating_point()}
    return a.keys() == b.keys() and all(same.values())


def train(module, steps=2, seed=0):
    for step in range(steps):
        torch.manual_seed(step)
        module(data(module, seed + step))
        update_codebooks(module)
    return module


def test_shapes_gradients_and_learning(variant):
    module = variant()
    before = tensors(module)
    x = data(module).requires_grad_()
    q = module(x)
    assert q.quantized.shape == x.shape and q.quantized.dtype == x.dtype
    positions = (3, 5, 7)
    parts = module.n_levels if isinstance(module, ResidualVQ) else module.heads
    expected = positions if parts == 1 else (*positions, parts)
    assert q.indices.shape == expected and q.indices.dtype == torch.int64
    (q.quantized.sum() + losses(q)).backward()
    assert x.grad.isfinite().all() and x.grad.any()
    if module.learnable:
        assert module.codebook.grad.any() and torch.equal(module.codebook, before["codebook"])
    else:
        assert not torch.equal(module.codebook, before["codebook"])
        if module.metric == "cosine":
            assert (module.codebook.norm(dim=-1) - 1).abs().max() < 1e-6
    usage = module.usage()
    assert usage.counts.sum() > 0 and (usage.used >= 1).any() and usage.counts.shape == module.cluster_size.shape
    assert (usage.perplexity <= 31.001).all() and (usage.used == (usage.counts > 0).sum(-1)).all()


def test_eval_changes_nothing_and_decodes(variant):
    module = train(variant()).eval()
    before, x = tensors(module), data(module)
    q = module(x)
    assert equal(tensors(module), before)
    assert torch.equal(module.encode(x), q.indices)
    assert torch.equal(module.decode(q.indices), q.quantized)


def test_manual_update_keeps_decode_equal_through_a_step(variant):
    module = variant(update="manual")
    for step in range(3):
        x = data(module, step).requires_grad_()
        torch.manual_seed(step)
        q = module(x)
        assert torch.equal(module.decode(q.indices), q.quantized)
        (losses(q) + q.quantized.sum()).backward()
        assert torch.equal(module.decode(q.indices), q.quantized)
        before = module.codebook.detach().clone()
        update_codebooks(module)
        if not module.learnable:
            assert not torch.equal(module.codebook, before)
        assert not module.pending_counts.any() and not module.pending_sums.any()


def test_micro_batches_add_up(variant):
    torch.manual_seed(1)
    whole = train(variant(), 1).train()  # k-means behind it
    whole.dead_code_threshold, whole.quantize_dropout = None, False
    manual = variant(update="manual")
    manual.load_state_dict(whole.state_dict())
    manual.dead_code_threshold, manual.quantize_dropout = None, False
    x = data(whole, 5, n=6)
    whole(x)
    for part in x.split(2):
        manual(part)
    update_codebooks(manual)
    assert torch.equal(whole.counts, manual.counts)
    # Three float32 sums instead of one, of numbers up to their magnitudes' sum: some units in the last place.
    for name, t in whole.named_buffers():
        if t.is_floating_point():
            torch.testing.assert_close(dict(manual.named_buffers())[name], t, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("update", ["forward", "manual"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_neither_updates_nor_records_twice(variant, update, reentrant):
    plain = train(variant(update=update), 1).train()
    twin = copy.deepcopy(plain)
    gradients = []
    for module in (plain, twin):
        x = data(module, 7).requires_grad_()
        torch.manual_seed(3)
        outputs = checkpoint(module, x, use_reentrant=reentrant) if module is twin else module(x)
        q = Quantized(*outputs[:4])
        after_forward = tensors(module)
        (q.quantized.square().sum() + losses(q)).backward()
        assert equal(tensors(module), after_forward), "backward changed a buffer"
        gradients.append(x.grad)
    assert equal(tensors(plain), tensors(twin))
    assert torch.equal(*gradients)


def test_nan_batch_changes_nothing(variant):
    module = train(variant())
    before = tensors(module)
    module(torch.full_like(data(module), torch.nan))
    assert equal(tensors(module), before)
    x = data(module)
    x.view(-1)[::1000] = torch.nan
    module(x)
    assert all(t.isfinite().all() for t in tensors(module).values())


def test_mask(variant):
    module, x = variant(), data(variant())
    mask = mask_of(x, module)
    twin = copy.deepcopy(module)
    wide = mask[:, None] if module.channel_first else mask[..., None]
    torch.manual_seed(4)
    q = module(x, mask)
    torch.manual_seed(4)
    other = twin(torch.where(wide, x, 1e3), mask)
    real = q.indices >= 0
    while real.dim() > mask.dim():
        real = real.any(dim=-1)
    assert torch.equal(real, mask)
    assert not torch.where(wide, 0, q.quantized).any()
    assert torch.equal(q.indices, other.indices) and torch.equal(q.quantized, other.quantized)
    assert torch.equal(losses(q), losses(other)) and equal(tensors(module), tensors(twin))
    before = tensors(module)
    module(x, torch.zeros_like(mask))
    assert equal(tensors(module), before)


def test_frozen(variant):
    module = train(variant())
    module.freeze()
    before = tensors(module)
    q = module(data(module))
    update_codebooks(module)
    assert equal(tensors(module), before)
    assert not module.learnable or not module.codebook.requires_grad
    if not isinstance(module, ResidualVQ) or not module.quantize_dropout:
        assert torch.equal(module.decode(q.indices), q.quantized)
    module.freeze(False)
    module(data(module))
    assert not equal(tensors(module), before)


@pytest.mark.parametrize("update", ["forward", "manual"])
def test_copies(variant, update):
    """deepcopy, pickle and state_dict give modules that go on alike."""
    module = train(variant(update=update))
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    loaded = variant(update=update)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded]
    train(module, 2, seed=10)
    for other in others:
        train(other, 2, seed=10)
        assert equal(tensors(other), tensors(module))


def test_buffers_stay_float32(variant):
    module = train(variant(update="manual"))
    before = tensors(module)
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16)):
        other = cast(copy.deepcopy(module))
        for name, t in other.named_buffers():
            if t.is_floating_point():
                assert t.dtype == torch.float32 and torch.equal(t.nan_to_num(-1), before[name].nan_to_num(-1)), name
    there = copy.deepcopy(module).to("meta")
    assert all(t.device.type == "meta" for t in there.buffers())
    narrow = copy.deepcopy(module).bfloat16()
    q = narrow(data(module).bfloat16())
    update_codebooks(narrow)
    assert q.quantized.dtype == torch.bfloat16 and narrow.cluster_size.dtype == torch.float32


def test_autocast(variant):
    module = train(variant())
    x = data(module)
    twin = copy.deepcopy(module)
    torch.manual_seed(5)
    expected = twin(x)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        q = module(x)
    if isinstance(module.project_in, torch.nn.Identity):  # a projection itself runs in bfloat16 there
        assert torch.equal(q.indices, expected.indices) and equal(tensors(module), tensors(twin))
    assert q.quantized.dtype in (torch.float32, torch.bfloat16)
    assert all(b.dtype == torch.float32 for b in module.buffers() if b.is_floating_point())


def test_compile(variant):
    module = train(variant())
    module.dead_code_threshold = None  # draws differ between eager and compiled
    twin = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        results = []
        for m, run in ((module, module), (twin, compiled)):
            x = data(m, 20 + seed).requires_grad_()
            torch.manual_seed(seed)  # quantize_dropout draws how many levels
            q = run(x)
            (q.quantized.square().sum() + losses(q)).backward()
            results.append((q.quantized, q.indices, x.grad))
        assert all(map(torch.equal, *results)) and equal(tensors(module), tensors(twin))


def test_compiled_by_the_default_backend_with_dead_codes():
    torch._dynamo.reset()
    module = VectorQuantizer(D, 31, dead_code_threshold=5.0)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(50, D)
    start = module.codebook.clone()
    q = compiled(x)
    assert torch.equal(q.quantized, start[q.indices])
    # Sizes start at 5, and 0.99 * 5 + 0.01 n falls below it where a code got fewer than 5 vectors.
    dead = module.counts < 5
    assert dead.any() and (module.codebook[dead][:, None] == x).all(-1).any(1).all()


def test_options_are_named_in_errors():
    for make, message in (
        (lambda: VectorQuantizer(0, 8), "VectorQuantizer: dim and heads must be at least 1, got 0"),
        (lambda: VectorQuantizer(8, 0), "n_codes must be at least 1, got 0"),
        (lambda: VectorQuantizer(8, 8, heads=3), "dim must be a multiple of heads, got 8 and 3; give code_dim"),
        (lambda: VectorQuantizer(8, 8, decay=2), r"decay must be in \[0, 1\]"),
        (lambda: VectorQuantizer(8, 8, metric="l1"), "metric must be one of"),
        (lambda: VectorQuantizer(8, 8, update="later"), "update must be one of 'forward', 'manual', got 'later'"),
        (lambda: VectorQuantizer(8, 8, dead_code_threshold=0), "dead_code_threshold must be above 0"),
        (lambda: GroupedVQ(8, 8, 3), "GroupedVQ: dim must be a multiple of heads"),
        (lambda: GroupedVQ(8, 8, 2, heads=2), "heads is set by n_groups"),
        (lambda: ResidualVQ(8, 8, 2, metric="cosine"), "residuals have no common length"),
        (lambda: ResidualVQ(8, 8, 0), "dim and n_levels must be at least 1"),
        (lambda: VectorQuantizer(8, 8)(torch.zeros(3, 7)), r"x must be \[..., dim\] with dim = 8, got \[3, 7\]"),
        (lambda: ResidualVQ(8, 8, 2, channel_first=True)(torch.zeros(3, 7)), r"x must be \[B, dim, ...\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_every_module_is_found_by_update_codebooks():
    model = torch.nn.ModuleDict(
        {"a": VectorQuantizer(D, 7, update="manual"), "b": ResidualVQ(D, 7, 2, update="manual")}
    )
    for m in model.values():
        m(torch.randn(20, D))
    codes = [m.codebook.clone() for m in model.values()]
    update_codebooks(model)
    assert all(isinstance(m, LearnedCodebook) for m in model.values())
    assert not any(torch.equal(m.codebook, c) for m, c in zip(model.values(), codes, strict=True))
