"""The patching itself: what changes, what must not, what is refused."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fastvq
from fastvq.compat import FallbackWarning, _apply
from tests.support.compat import doubles
from tests.support.compat.peers import peer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.quantizer = nn.Linear(8, 8), doubles.Quantize(8, 16)

    def forward(self, x):
        return self.quantizer(self.encoder(x))[0]


def x() -> torch.Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def test_what_stays_as_it_was():
    model = Model()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    calls = []
    model.quantizer.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (id(t), t.dtype) for name, t in model.state_dict(keep_vars=True).items()}
    parameters, shown, kind = [id(p) for p in model.parameters()], repr(model), type(model.quantizer)
    report = fastvq.patch(model)
    assert {name: (id(t), t.dtype) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert [id(p) for p in model.parameters()] == parameters and repr(model) == shown
    assert isinstance(model.quantizer, doubles.Quantize) and type(model.quantizer) is not kind
    model(x()).sum().backward()
    optimiser.step()
    assert calls == [1]
    assert report and [r.name for r in report.replaced] == ["quantizer"] and not report.left
    assert "faster:\n  quantizer: vqvae.Quantize" in str(report)
    assert fastvq.unpatch(model) == 1 and type(model.quantizer) is kind
    assert fastvq.unpatch(model) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device_stay_and_can_be_changed_afterwards(dtype):
    before, after = Model().to(dtype), Model()
    fastvq.patch(before), fastvq.patch(after)
    after.to(dtype)
    for model in (before, after):
        assert {t.dtype for t in model.state_dict().values()} == {dtype}
        assert model(x().to(dtype)).dtype == dtype
    empty = nn.Sequential(doubles.Quantize(8, 16)).to("meta")
    assert fastvq.patch(empty) and {t.device.type for t in empty.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("saves", ["patched", "plain"])
@pytest.mark.parametrize("which", ["rosinality", "vector_quantize_pytorch"])
def test_a_file_of_one_is_read_by_the_other(which, saves, tmp_path):
    def make():
        torch.manual_seed(0)
        if which == "rosinality":
            return doubles.Quantize(8, 16)
        return peer("vector_quantize_pytorch").ResidualVQ(dim=8, codebook_size=16, num_quantizers=2)

    plain, patched = make(), make()
    fastvq.patch(patched, strict=True)
    source, target = (patched, plain) if saves == "patched" else (plain, patched)
    source(x()[None])  # a training step, so that every buffer has moved
    torch.save(source.state_dict(), tmp_path / "state.pt")
    target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    found = [next(t for t in model.eval()(x()[None]) if not t.is_floating_point()) for model in (source, target)]
    assert torch.equal(*found)


def test_a_version_newer_than_any_compared_is_said(monkeypatch):
    vqp = peer("vector_quantize_pytorch")
    _apply._untested.cache_clear()
    monkeypatch.setattr(_apply.importlib.metadata, "version", lambda name: "99.0")
    try:
        assert "vector-quantize-pytorch 99.0 is newer than" in str(fastvq.patch(vqp.VectorQuantize(8, 4)))
    finally:
        _apply._untested.cache_clear()


def test_the_whole_tree_is_walked():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.levels = nn.ModuleDict({"fine": nn.Sequential(nn.Identity(), doubles.Quantize(8, 16))})

    model = nn.ModuleList([Part(), doubles.VQ(8, 16)])
    shared = nn.ModuleList([model, model[1]])  # the same module twice is one module
    report = fastvq.patch(shared, strict=True)
    assert [one.name for one in report.replaced] == ["0.0.levels.fine.1", "0.1"]


def test_idempotent():
    model = Model()
    first = fastvq.patch(model)
    cls = type(model.quantizer)
    assert fastvq.patch(model) == first and type(model.quantizer) is cls


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_and_stand_alone(how, monkeypatch):
    monkeypatch.setitem(sys.modules, "vqvae", doubles)
    model = Model()
    fastvq.patch(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other.quantizer) is type(model.quantizer)
    kept = model.quantizer.embed.clone()
    other(x())
    assert torch.equal(model.quantizer.embed, kept) and not torch.equal(other.quantizer.embed, kept)
    assert fastvq.unpatch(other) == 1 and fastvq.unpatch(model) == 1


def test_nothing_to_replace():
    report = fastvq.patch(nn.Linear(2, 2))
    assert not report and "0 faster" in str(report)
    with pytest.raises(ValueError, match="holds no quantizer that fastvq knows"):
        fastvq.patch(nn.Linear(2, 2), strict=True)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        fastvq.patch("model")


def test_a_subclass_with_its_own_forward_is_left():
    class Mine(doubles.Quantize):
        def forward(self, input):
            return super().forward(input * 2)

    model = nn.Sequential(Mine(8, 16), doubles.Quantize(8, 16))
    report = fastvq.patch(model)
    assert [one.name for one in report.left] == ["0"] and "has its own forward" in report.left[0].reason
    assert [one.name for one in report.replaced] == ["1"]
    fastvq.unpatch(model)
    with pytest.raises(ValueError, match="nothing was changed"):
        fastvq.patch(model, strict=True)
    assert fastvq.unpatch(model) == 0


def test_a_subclass_that_adds_to_it_is_replaced():
    class Mine(doubles.Quantize):
        def count(self):
            return self.n_embed

    model = Mine(8, 16)
    assert fastvq.patch(model) and model.count() == 16


def test_unknown_layouts_and_wrapped_forwards_are_left():
    strange, hooked = doubles.Quantize(8, 16), doubles.Quantize(8, 16)
    del strange.cluster_size
    hooked.forward = hooked.forward
    reasons = [fastvq.patch(one).left[0].reason for one in (strange, hooked)]
    assert "no cluster_size" in reasons[0] and "replaced on the instance" in reasons[1]


def test_a_namesake_is_not_taken_for_it():
    cls = type("Quantize", (nn.Module,), {"__module__": "somewhere.else"})
    assert not fastvq.patch(cls()).left


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_refused(how):
    model = Model()
    if how == "wrapped":
        model = torch.compile(model)
    else:
        model.quantizer.compile()
    with pytest.raises(ValueError, match="patch the plain model first, then compile it"):
        fastvq.patch(model)
    assert fastvq.unpatch(model) == 0


def test_patched_then_compiled():
    model = Model().eval()
    fastvq.patch(model)
    expected = model(x())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x()), expected, rtol=0, atol=0)


def test_distributed_data_parallel(tmp_path):
    """In a process of its own: a process group is for a whole process."""
    code = f"""
import torch, fastvq
from torch import distributed
from tests.compat.test_patch import Model, x
distributed.init_process_group("gloo", init_method="file://{tmp_path}/group", rank=0, world_size=1)
torch.manual_seed(0)
plain = Model()
wrapped = torch.nn.parallel.DistributedDataParallel(Model())
wrapped.module.load_state_dict(plain.state_dict())
report = fastvq.patch(wrapped)
assert [r.name for r in report.replaced] == ["module.quantizer"], report
fastvq.patch(plain)
wrapped(x()).sum().backward()
plain(x()).sum().backward()
for a, b in zip(plain.state_dict().values(), wrapped.module.state_dict().values()):
    assert torch.equal(a, b)
for a, b in zip(plain.parameters(), wrapped.parameters()):
    assert torch.equal(a.grad, b.grad)
distributed.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_patch_class_and_back():
    before = doubles.Quantize(8, 16)
    assert fastvq.patch_class(doubles.Quantize) == ["vqvae.Quantize"]
    try:
        assert fastvq.patch_class(doubles.Quantize) == ["vqvae.Quantize"]
        made = Model()
        assert fastvq.unpatch(made) == 1 and fastvq.unpatch(before) == 0
    finally:
        assert fastvq.unpatch_class(doubles.Quantize) == ["vqvae.Quantize"]
    assert fastvq.unpatch(Model()) == 0 and fastvq.unpatch_class(doubles.Quantize) == []


def test_patch_class_by_package():
    vqp = peer("vector_quantize_pytorch")
    names = fastvq.patch_class("vector_quantize_pytorch")
    try:
        assert any(name.endswith("VectorQuantize") for name in names)
        # Two layers and their codebooks, and the whole.
        assert fastvq.unpatch(vqp.ResidualVQ(dim=8, codebook_size=4, num_quantizers=2)) == 5
    finally:
        fastvq.unpatch_class("vector_quantize_pytorch")
    assert fastvq.unpatch(vqp.VectorQuantize(8, 4)) == 0


def test_patch_class_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"peer must be one of .*vector_quantize_pytorch.* got 'numpy'"):
        fastvq.patch_class("numpy")
    with pytest.raises(ValueError, match="no class that fastvq knows"):
        fastvq.patch_class(nn.Linear)
    with pytest.raises(ValueError, match="could be imported; install it"):
        fastvq.patch_class("audiocraft")


def test_a_fall_back_warns_once():
    vqp = peer("vector_quantize_pytorch")
    models = [vqp.VectorQuantize(8, 4) for _ in range(2)]
    given = x()[None]
    for model in models:
        fastvq.patch(model)
        model.eval()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for model in models:
            for _ in range(2):
                model(given, codebook_transform_fn=lambda codes: codes[:, None, None].expand(1, 1, 32, 4, 8))
    assert [w.category for w in seen if "fastvq" in str(w.message)] == [FallbackWarning]


def test_modules_to_import():
    vqp = peer("vector_quantize_pytorch")
    from fastvq.compat.vector_quantize_pytorch import ResidualVQ, VectorQuantize

    torch.manual_seed(0)
    ours = VectorQuantize(8, 4)
    torch.manual_seed(0)
    theirs = vqp.VectorQuantize(8, 4)
    assert isinstance(ours, vqp.VectorQuantize) and ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours(x()[None])[1], theirs(x()[None])[1])
    assert fastvq.unpatch(pickle.loads(pickle.dumps(ResidualVQ(dim=8, codebook_size=4, num_quantizers=2)))) == 5
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'; it has VectorQuantize"):
        fastvq.compat.vector_quantize_pytorch.Nothing  # noqa: B018
