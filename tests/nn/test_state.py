"""The state of quantizers: learnable codebooks with dead codes, dtypes, codes set by the user, frozen codes, totals."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastvq.nn import GroupedVQ, ResidualVQ, VectorQuantizer, update_codebooks
from fastvq.ops import code_statistics, quantize
from tests.support.cases import generator

D, K = 8, 64
LEARNABLE = {
    "plain": lambda **o: VectorQuantizer(D, K, **o),
    "cosine": lambda **o: VectorQuantizer(D, K, metric="cosine", **o),
    "dot": lambda **o: VectorQuantizer(D, K, metric="dot", **o),
    "heads": lambda **o: VectorQuantizer(D, K, heads=2, **o),
    "grouped": lambda **o: GroupedVQ(D, K, 2, **o),
    "residual": lambda **o: ResidualVQ(D, K, 3, **o),
    "residual shared": lambda **o: ResidualVQ(D, K, 3, shared_codebook=True, **o),
}


def losses(q):
    return (q[2] + q[3]).sum()


def gradients(module, x, run):
    torch.manual_seed(1)
    q = run(x)
    (q[0].square().sum() + losses(q)).backward()
    found = [p.grad.clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = None
    return found


@pytest.mark.parametrize("name", LEARNABLE)
def test_learnable_codebook_with_dead_codes_trains(name):
    """Gradients equal those of a copy whose codes never die, with and without activation checkpointing."""
    torch.manual_seed(0)
    module = LEARNABLE[name](learnable=True, dead_code_threshold=1.0)
    other = copy.deepcopy(module)
    other.dead_code_threshold = None
    again = copy.deepcopy(module)
    before, x = module.codebook.detach().clone(), torch.randn(8, D)
    expected = gradients(other, x, other)
    assert all(map(torch.equal, gradients(module, x, module), expected))
    assert not torch.equal(module.codebook, before), "no code died, so nothing was tested"
    recomputed = gradients(again, x, lambda x: checkpoint(again, x, use_reentrant=False))
    assert all(map(torch.equal, recomputed, expected)) and torch.equal(again.codebook, module.codebook)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        losses(module(torch.randn(8, D))).backward()
        optimizer.step()
    assert module.codebook.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dead_codes_of_a_codebook_of_another_dtype(dtype):
    """A parameter is cast with its module, the sizes are not."""
    module = VectorQuantizer(D, K, learnable=True, dead_code_threshold=1.0).to(dtype)
    before, x = module.codebook.detach().clone(), torch.randn(8, D).to(dtype)
    losses(module(x)).backward()
    changed = (module.codebook != before).any(dim=1)
    assert changed.any() and (module.codebook[changed][:, None] == x.float().to(dtype)).all(-1).any(1).all()


def test_compiled_learnable_codebook_with_dead_codes():
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = VectorQuantizer(D, K, learnable=True, dead_code_threshold=1.0)
    other = copy.deepcopy(module)
    other.dead_code_threshold = None
    before, x = module.codebook.detach().clone(), torch.randn(8, D)
    expected = gradients(other, x, other)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(module, x, compiled), expected))
    assert not torch.equal(module.codebook, before)


# ---- float32 by every way


def floats(module):
    return [b for b in module.buffers() if b.is_floating_point()]


@pytest.mark.parametrize("make", [LEARNABLE["plain"], LEARNABLE["residual"]])
@pytest.mark.parametrize("update", ["forward", "manual"])
@pytest.mark.parametrize("way", ["default dtype", "assigned", "data"])
def test_buffers_are_float32_by_every_way(way, update, make):
    def made():
        return make(update=update, dead_code_threshold=1.0)

    if way == "default dtype":
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            module = made()
        finally:
            torch.set_default_dtype(before)
        assert all(b.dtype == torch.float32 for b in floats(module))
    else:
        module = made()
        for name, b in module.named_buffers():
            if way == "assigned":
                setattr(module, name, b.bfloat16())
            else:
                b.data = b.data.bfloat16()
    q = module(torch.randn(50, D, dtype=torch.bfloat16))
    update_codebooks(module)
    assert all(b.dtype == torch.float32 and b.isfinite().all() for b in floats(module))
    assert module.decode(q.indices).dtype == q.quantized.dtype == torch.bfloat16


def test_a_compiled_module_makes_assigned_buffers_float32():
    torch._dynamo.reset()
    module = VectorQuantizer(D, K)
    for name, b in module.named_buffers():
        setattr(module, name, b.bfloat16())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(torch.randn(50, D))
    assert all(b.dtype == torch.float32 for b in floats(module)) and module.counts.sum() == 50


@pytest.mark.parametrize("make", [LEARNABLE["plain"], LEARNABLE["heads"], LEARNABLE["residual"]])
@pytest.mark.parametrize("options", [{}, {"code_dim": 3}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_modules_and_inputs_of_any_two_dtypes(x_dtype, dtype, options, make):
    module = make(**options).to(dtype)
    q = module(torch.randn(9, D, dtype=x_dtype, requires_grad=True))
    assert q.quantized.dtype == x_dtype
    assert module.decode(q.indices).dtype == dtype
    q.quantized.sum().backward()
    module.eval()
    if x_dtype == dtype:
        q = module(torch.randn(9, D, dtype=x_dtype))
        assert torch.equal(module.decode(q.indices), q.quantized)
    back = copy.deepcopy(module).float()
    assert back.decode(q.indices).dtype == torch.float32


# ---- ids


@pytest.mark.parametrize("make", LEARNABLE.values(), ids=LEARNABLE)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_ids_of_any_integer_type_decode_alike(dtype, make):
    module = make()
    ids = module.encode(torch.randn(16, D))
    assert torch.equal(module.decode(ids.to(dtype)), module.decode(ids))
    same = torch.full_like(ids, 3)
    assert torch.equal(module.decode(same.to(dtype)), module.decode(same))


@pytest.mark.parametrize("make", [VectorQuantizer, lambda d, k: ResidualVQ(d, k, 1), lambda d, k: GroupedVQ(d, k, 2)])
def test_ids_that_are_none_are_named(make):
    module = make(D, K)
    ids = module.encode(torch.randn(16, D))
    for wrong, error, message in (
        (ids > 3, TypeError, r"decode: indices must be an integer tensor, got torch.bool"),
        (ids.float(), TypeError, r"decode: indices must be an integer tensor, got torch.float32"),
        ([1, 2], TypeError, r"decode: indices must be an integer tensor, got list"),
        (torch.full_like(ids, K), ValueError, rf"decode: indices must be in \[-1, {K}\) .*, got {K} at row"),
        (torch.full_like(ids, -2), ValueError, rf"decode: indices must be in \[-1, {K}\) .*, got -2 at row"),
    ):
        with pytest.raises(error, match=message):
            module.decode(wrong)
    assert module.decode(ids[:0]).shape == (0, D)


def test_another_number_of_heads_or_levels_is_named():
    with pytest.raises(ValueError, match=r"GroupedVQ.decode: indices must be \[..., 2\], one a head, got \[5, 3\]"):
        GroupedVQ(D, K, 2).decode(torch.zeros(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ResidualVQ.decode: indices must be \[..., Q\] with Q at most 2 levels"):
        ResidualVQ(D, K, 2).decode(torch.zeros(5, 3, dtype=torch.int64))


# ---- a codebook of one's own


@pytest.mark.parametrize("name", LEARNABLE)
@pytest.mark.parametrize("options", [{}, {"learnable": True}, {"kmeans_init": True}, {"update": "manual"}])
def test_set_codebook_is_not_forgotten(options, name):
    torch.manual_seed(0)
    module = LEARNABLE[name](**options)
    module(torch.randn(100, D))
    codes = torch.randn_like(module.codebook) * 5
    if module.metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1)
    module.set_codebook(codes)
    assert torch.equal(module.codebook, codes) and module.initialised and not module.counts.any()
    update_codebooks(module)  # what waited belongs to the old codes
    assert torch.equal(module.codebook, codes)
    module(torch.randn(20, D))
    update_codebooks(module)
    unused = module.counts == 0
    assert unused.any()
    # Laplace smoothing takes K eps of the whole weight and gives each code eps.
    torch.testing.assert_close(module.codebook[unused], codes[unused], rtol=1e-3, atol=1e-3)


def test_sizes_of_set_codebook_are_weights():
    module = VectorQuantizer(D, 2, decay=0.5, eps=0.0)
    module.set_codebook(torch.eye(2, D), sizes=torch.tensor([3.0, 1.0]))
    module(2 * torch.eye(2, D)[:1].expand(3, D))
    assert module.cluster_size.tolist() == [3.0, 0.5]
    torch.testing.assert_close(module.codebook, torch.eye(2, D) * torch.tensor([[1.5], [1.0]]))


def test_set_codebook_names_what_does_not_fit():
    module = VectorQuantizer(D, K)
    codes = torch.randn(K, D)
    for arguments, error, message in (
        ((codes.t(),), ValueError, rf"set_codebook: codes must be \[{K}, {D}\], got \[{D}, {K}\]"),
        ((codes.long(),), TypeError, r"set_codebook: codes must be float32"),
        ((codes / 0,), ValueError, r"set_codebook: codes must be finite"),
        ((codes, torch.ones(3)), ValueError, rf"set_codebook: sizes must be \[{K}\], got \[3\]"),
        ((codes, torch.zeros(K)), ValueError, r"set_codebook: sizes must be positive and finite"),
        ((codes, torch.ones(K).long()), TypeError, r"set_codebook: sizes must be float32"),
    ):
        with pytest.raises(error, match=message):
            module.set_codebook(*arguments)


@pytest.mark.parametrize("name", LEARNABLE)
@pytest.mark.parametrize(
    "options",
    [
        {"dead_code_threshold": 0.995},
        {"dead_code_threshold": 0.995, "update": "manual"},
        {"dead_code_threshold": 0.995, "learnable": True},
        {"kmeans_init": True},
    ],
)
def test_frozen_codes_stay_and_the_others_learn(options, name):
    torch.manual_seed(0)
    module = LEARNABLE[name](**options)
    mask = torch.rand(module.cluster_size.shape, generator=generator(1)) < 0.5
    module.freeze_codes(mask)
    assert torch.equal(module.frozen_codes, mask)
    before = {n: b.clone() for n, b in (*module.named_buffers(), *module.named_parameters())}
    for step in range(3):
        q = module(torch.randn(50, D, generator=generator(10 + step)).requires_grad_())
        losses(q).backward()
        if module.learnable:
            assert not module.codebook.grad[mask].any() and module.codebook.grad[~mask].any()
        update_codebooks(module)
    for buffer in ("codebook", "embed_sum", "cluster_size"):
        if buffer in before:
            now = getattr(module, buffer)
            assert torch.equal(now[mask], before[buffer][mask]), buffer
            assert not torch.equal(now[~mask], before[buffer][~mask]), buffer
    module.freeze_codes(None)
    module(torch.randn(50, D))
    update_codebooks(module)
    assert module.frozen_codes is None and not torch.equal(module.cluster_size[mask], before["cluster_size"][mask])


def test_frozen_codes_are_saved():
    module = VectorQuantizer(D, K)
    mask = torch.arange(K) < 5
    module.freeze_codes(mask)
    other = VectorQuantizer(D, K)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.frozen_codes, mask)
    other.load_state_dict(VectorQuantizer(D, K).state_dict())  # from before they were frozen
    assert torch.equal(other.frozen_codes, mask)
    with pytest.raises(TypeError, match=r"freeze_codes: mask must be a bool tensor, got torch.int64"):
        module.freeze_codes(torch.arange(K))
    with pytest.raises(ValueError, match=rf"freeze_codes: mask must be \[{K}\], got \[3\]"):
        module.freeze_codes(torch.ones(3, dtype=torch.bool))


# ---- how codes are used over many steps


@pytest.mark.parametrize("name", LEARNABLE)
@pytest.mark.parametrize("update", ["forward", "manual"])
def test_usage_over_many_forwards(update, name):
    torch.manual_seed(0)
    module = LEARNABLE[name](update=update)
    module(torch.randn(10, D))
    with pytest.raises(ValueError, match=r"usage: total=True needs counts; call track_usage\(\)"):
        module.usage(total=True)
    with pytest.raises(ValueError, match="usage: all_ranks needs total=True"):
        module.usage(all_ranks=True)
    module.track_usage()
    total = torch.zeros_like(module.counts)

    def count(q, x):
        ids = q.indices if q.indices.dim() > 1 else q.indices[:, None]
        for part in range(ids.shape[1]):
            found = code_statistics(x, ids[:, part].contiguous(), K)[1]
            (total[part] if total.dim() > 1 else total).add_(found)

    for training in (True, False, True, False):
        module.train(training)
        x = torch.randn(30, D)
        x[3] = torch.nan
        mask = torch.arange(30) < 20
        q = module(x, mask)
        count(q, x)
        checkpoint(module, x[:0].requires_grad_(), use_reentrant=False)
    update_codebooks(module)
    usage = module.usage(total=True)
    assert torch.equal(usage.counts, total) and torch.equal(usage.used, (total > 0).sum(-1))
    assert module.usage().counts.sum() < total.sum()
    module.eval()
    module.encode(x[:3])
    assert torch.equal(module.usage(total=True).counts, total)
    module.reset_usage()
    assert not module.usage(total=True).counts.any()
    module.track_usage(False)
    module.reset_usage()


# ---- averages without any weight


@pytest.mark.parametrize("make", [LEARNABLE["plain"], LEARNABLE["grouped"], LEARNABLE["residual"]])
def test_codes_without_weight_keep_their_place(make):
    """decay=0 forgets everything: a code that no vector chose has no average, and stays."""
    torch.manual_seed(0)
    module = make(decay=0.0, eps=0.0)
    before = module.codebook.clone()
    module(torch.randn(20, D))
    unused = module.counts == 0
    assert unused.any() and torch.equal(module.codebook[unused], before[unused])
    assert module.codebook.isfinite().all() and not torch.equal(module.codebook, before)


# ---- the first batch of k-means


@pytest.mark.parametrize("name", LEARNABLE)
@pytest.mark.parametrize("batch", ["empty", "nan", "masked"])
@pytest.mark.parametrize("update", ["forward", "manual"])
def test_kmeans_waits_for_a_usable_vector(update, batch, name):
    torch.manual_seed(0)
    module = LEARNABLE[name](kmeans_init=True, update=update)
    state = {n: t.clone() for n, t in module.state_dict().items()}
    x, mask = torch.randn(200, D), None
    if batch == "empty":
        x = x[:0]
    elif batch == "nan":
        x[:] = torch.nan
    else:
        mask = torch.zeros(200, dtype=torch.bool)
    q = module(x, mask)
    update_codebooks(module)
    assert q.quantized.shape == x.shape and not module.initialised
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    x = torch.randn(200, D)
    module(x)
    assert module.initialised
    if module.metric == "euclidean" and not module.lead and isinstance(module, VectorQuantizer) and module.heads == 1:
        assert quantize(x, module.codebook).codebook_loss < 0.6


# ---- groups


def test_a_process_group_is_shared_by_copies_and_not_pickled():
    with pytest.raises(
        TypeError, match=r"VectorQuantizer: group must be a torch.distributed.ProcessGroup or None, got"
    ):
        VectorQuantizer(D, K, group="all")
    with pytest.raises(ValueError, match="VectorQuantizer: group must be None with sync='none'"):
        VectorQuantizer(D, K, group="all", sync="none")
    module = VectorQuantizer(D, K)
    module.group_of_ranks.group = object()
    assert copy.deepcopy(module).group_of_ranks.group is module.group_of_ranks.group
    with pytest.raises(TypeError, match="a process group cannot be pickled; save the module's state_dict"):
        pickle.dumps(module)
