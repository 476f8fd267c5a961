"""docs/what_happens_when.md, section "Loading": one test a row, for every kind of quantizer."""

import copy
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvq.nn import GroupedVQ, ResidualVQ, VectorQuantizer, update_codebooks

D, K = 8, 16
KINDS = {
    "plain": lambda: VectorQuantizer(D, K, kmeans_init=True),
    "manual": lambda: VectorQuantizer(D, K, kmeans_init=True, update="manual", dead_code_threshold=1.0),
    "cosine": lambda: VectorQuantizer(D, K, kmeans_init=True, metric="cosine", code_dim=4),
    "learnable": lambda: VectorQuantizer(D, K, kmeans_init=True, learnable=True, dead_code_threshold=1.0),
    "grouped": lambda: GroupedVQ(D, K, 2, kmeans_init=True, update="manual"),
    "residual": lambda: ResidualVQ(D, K, 2, kmeans_init=True, update="manual", dead_code_threshold=1.0),
}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.vq = KINDS[kind]()

    def forward(self, x):
        return self.vq(self.encoder(x))


def step(model, seed):
    torch.manual_seed(seed)
    dtype = next(model.parameters()).dtype
    q = model(torch.randn(60, D).to(dtype))
    update_codebooks(model)
    return q


def trained(kind, make=Net):
    torch.manual_seed(0)
    model = make(kind)
    for seed in range(2):
        step(model, seed)
    assert model.vq.initialised
    return model


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def earlier(model):
    """The state as earlier versions saved it."""
    return {name: t.bool() if name.endswith("initialised") else t for name, t in state(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fresh(kind, seed=5):
    torch.manual_seed(seed)
    return Net(kind)


# ---- the ways of loading: each returns a model that goes on from what ``source`` has learned


def load_state_dict(source, kind, folder):
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    model = fresh(kind)
    model.load_state_dict(torch.load(stream, weights_only=True))
    return model


def assigned(source, kind, folder):
    model = fresh(kind)
    model.load_state_dict(state(source), assign=True)
    return model


def of_an_earlier_version(source, kind, folder):
    """Earlier versions had a bool ``initialised``."""
    torch.save(earlier(source), folder)
    model = fresh(kind)
    model.load_state_dict(torch.load(folder, weights_only=True))
    return model


def assigned_of_an_earlier_version(source, kind, folder):
    model = fresh(kind)
    model.load_state_dict(earlier(source), assign=True)
    return model


def tensors_of_an_earlier_version(source, kind, folder):
    """As ``from_pretrained`` of transformers and diffusers set them."""
    model = fresh(kind)
    for name, tensor in earlier(source).items():
        *inner, last = name.split(".")
        module = model.get_submodule(".".join(inner))
        setattr(module, last, nn.Parameter(tensor) if last in module._parameters else tensor)
    model.eval()(torch.zeros(1, D))
    return model.train()


def deep_copied(source, kind, folder):
    return copy.deepcopy(source)


def pickled(source, kind, folder):
    torch.save(source, folder)
    return torch.load(folder, weights_only=False)


def averaged(source, kind, folder):
    live = fresh(kind)
    average = AveragedModel(live)
    live.load_state_dict(source.state_dict())
    average.update_parameters(live)
    return average.module


def averaged_with_buffers(source, kind, folder):
    live = fresh(kind)
    average = AveragedModel(live, use_buffers=True)
    live.load_state_dict(source.state_dict())
    for _ in range(3):
        average.update_parameters(live)  # all averages are of equal values
    return average.module


def averaged_exponentially(source, kind, folder):
    live = fresh(kind)
    average = AveragedModel(live, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    live.load_state_dict(source.state_dict())
    for _ in range(3):
        average.update_parameters(live)
    return average.module


def distributed_checkpoint(source, kind, folder):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    checkpoint.save(source.state_dict(), checkpoint_id=folder, no_dist=True)
    model = fresh(kind)
    tensors = model.state_dict()
    checkpoint.load(tensors, checkpoint_id=folder, no_dist=True)  # writes into the model's tensors
    return model


def distributed_checkpoint_after_a_step(source, kind, folder):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    checkpoint.save(source.state_dict(), checkpoint_id=folder, no_dist=True)
    model = fresh(kind)
    model(torch.full((3, D), torch.nan))  # has asked its buffer already
    checkpoint.load(model.state_dict(), checkpoint_id=folder, no_dist=True)
    return model


def emptied(source, kind, folder):
    with torch.device("meta"):
        model = Net(kind)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    return model


WAYS = {
    f.__name__: f
    for f in (
        load_state_dict, assigned, of_an_earlier_version, assigned_of_an_earlier_version,
        tensors_of_an_earlier_version, pickled, deep_copied, averaged, averaged_with_buffers, averaged_exponentially,
        distributed_checkpoint, distributed_checkpoint_after_a_step, emptied,
    )
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_loaded_model_goes_on_as_the_saved_one(way, kind, tmp_path):
    source = trained(kind)
    loaded = WAYS[way](source, kind, tmp_path / "checkpoint")
    assert same(state(loaded), state(source))
    for seed in (7, 8):
        a, b = step(loaded, seed), step(source, seed)
        assert torch.equal(a.indices, b.indices) and torch.equal(a.quantized, b.quantized)
        assert same(state(loaded), state(source))
    assert torch.equal(loaded.vq.usage().counts, source.vq.usage().counts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_an_unstarted_model_starts_after_loading(way, kind, tmp_path):
    """The buffer decides: loaded into a model that has learned, it starts too."""
    torch.manual_seed(0)
    source = Net(kind)
    loaded = WAYS[way](source, kind, tmp_path / "checkpoint")
    assert not loaded.vq.initialised
    step(loaded, 7)
    step(source, 7)
    assert loaded.vq.initialised and same(state(loaded), state(source))
    if way in ("load_state_dict", "assigned"):
        other = trained(kind)
        other.load_state_dict(Net(kind).state_dict(), assign=way == "assigned")
        step(other, 7)
        assert other.vq.initialised


def test_a_deep_copy_keeps_what_waits_and_totals():
    source = trained("manual")
    source.vq.track_usage()
    source(torch.randn(60, D))
    loaded = copy.deepcopy(source)
    assert loaded.vq.pending_counts.sum() == 60 and loaded.vq.usage(total=True).counts.sum() == 60
    update_codebooks(source)
    assert loaded.vq.pending_counts.sum() == 60


def test_a_module_pickled_by_an_earlier_version_says_what_to_load():
    stream = io.BytesIO()
    module = VectorQuantizer(D, K)
    del module._counts
    torch.save(module, stream)
    stream.seek(0)
    with pytest.raises(ValueError, match=r"VectorQuantizer: .* pickled by another version .* load_state_dict"):
        torch.load(stream, weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
def test_to_empty_and_reset_parameters_make_a_new_start(kind):
    with torch.device("meta"):
        model = Net(kind)
    assert all(b.is_meta for b in model.buffers())
    model.to_empty(device="cpu")
    for t in (*model.parameters(), *model.buffers()):
        t.detach().fill_(torch.nan)  # what to_empty leaves is undefined
    assert not model.vq.counts.any()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not model.vq.initialised and model.vq.codebook.isfinite().all()
    step(model, 0)
    assert model.vq.initialised and all(t.isfinite().all() for t in model.state_dict().values())


# ---- transformers and diffusers


def transformers_model():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Config(transformers.PretrainedConfig):
        model_type = "fastvq-test"

        def __init__(self, kind="plain", **kwargs):
            self.kind = kind
            super().__init__(**kwargs)

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.net = Net(config.kind)
            self.post_init()

        @property
        def vq(self):
            return self.net.vq

        def forward(self, x):
            return self.net(x)

    return Model, lambda kind: Model(Config(kind)), "dtype"


def diffusers_model():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

    class Model(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, kind: str = "plain"):
            super().__init__()
            self.net = Net(kind)

        @property
        def vq(self):
            return self.net.vq

        def forward(self, x):
            return self.net(x)

    return Model, Model, "torch_dtype"


LIBRARIES = {"transformers": transformers_model, "diffusers": diffusers_model}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_from_pretrained_goes_on_as_the_saved_model(library, kind, tmp_path):
    cls, make, _ = LIBRARIES[library]()
    source = trained(kind, make)
    source.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).train()
    assert same(state(loaded), state(source))
    assert not loaded.vq.usage().counts.any()
    for seed in (7, 8):
        step(loaded, seed)
        step(source, seed)
        assert same(state(loaded), state(source))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_from_pretrained_in_bfloat16_keeps_averages_in_float32(library, kind, tmp_path):
    """diffusers with accelerate rounds what it loads, once; from then on averages are float32."""
    cls, make, dtype = LIBRARIES[library]()
    source = trained(kind, make)
    source.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, **{dtype: torch.bfloat16}).train()
    twin = make(kind)
    twin.load_state_dict(source.state_dict())
    if library == "diffusers" and importlib.util.find_spec("accelerate"):
        for b in twin.buffers():
            b.copy_(b.bfloat16())
    twin.bfloat16()
    for seed in (7, 8):
        q = step(loaded, seed)
        step(twin, seed)
    assert q.quantized.dtype == loaded.vq.decode(q.indices).dtype == torch.bfloat16
    for name, b in loaded.named_buffers():
        assert b.dtype == torch.float32 and torch.equal(b, dict(twin.named_buffers())[name]), name
    assert loaded.vq.initialised


@pytest.mark.parametrize("library", LIBRARIES)
def test_from_pretrained_leaves_no_statistics_undefined(library, tmp_path):
    """One update right after loading moves no code: nothing was recorded."""
    cls, make, _ = LIBRARIES[library]()
    source = trained("manual", make)
    source.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).train()
    update_codebooks(loaded)
    assert same(state(loaded), state(source))


# ---- the buffer is not read at every step


def test_the_buffer_is_read_only_when_it_may_have_changed(monkeypatch):
    reads = []
    read = torch.Tensor.__bool__
    model = trained("plain")

    def watched(t):
        if t is model.vq.initialised:
            reads.append(1)
        return read(t)

    monkeypatch.setattr(torch.Tensor, "__bool__", watched)
    model.load_state_dict(model.state_dict())
    reads.clear()
    for seed in range(5):
        step(model, seed)
    model.eval()(torch.randn(3, D))
    assert not reads
    model.train()
    model.vq.initialised = torch.ones(())
    for seed in range(5):
        step(model, seed)
    assert len(reads) == 1


def test_every_row_of_the_table_has_a_test():
    text = (Path(__file__).parent.parent.parent / "docs" / "what_happens_when.md").read_text()
    section = text.split("## Loading")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+(?:\[\w+\])?)`", section)
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 8 and all("`test_" in row for row in rows)
    for name in named:
        function, _, way = name.partition("[")
        assert function in globals(), name
        assert not way or way.rstrip("]") in {**WAYS, **LIBRARIES}, name
