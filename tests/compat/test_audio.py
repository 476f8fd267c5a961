"""Audio codecs: encodec, moshi, and transformers' Encodec, Xcodec, Higgs, Mimi and DAC."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import fastvq
from tests.support.compat.lockstep import Lookup, lockstep
from tests.support.compat.peers import peer, peer_part

B, D, K, T, Q = 2, 16, 24, 60, 3


def sound(step: int) -> torch.Tensor:
    return torch.randn(B, D, T, generator=torch.Generator().manual_seed(step))


def by_codebook(codes):
    """Looks at a codebook's forward or encode: [..., D] -> indices, the last of its outputs that are integers."""

    def look(module, x, outputs, state):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        indices = next(o for o in outputs if isinstance(o, torch.Tensor) and not o.is_floating_point())
        return Lookup(x.reshape(-1, D), codes(state), indices.flatten())

    return look


@pytest.mark.parametrize("expire", [False, True])
def test_encodec(expire):
    core = peer_part("encodec.quantization.core_vq")
    lockstep(
        lambda: core.ResidualVectorQuantization(
            num_quantizers=Q, dim=D, codebook_size=K, kmeans_init=False, threshold_ema_dead_code=2 if expire else 0
        ),
        sound, lambda m, x: m(x), "EuclideanCodebook", by_codebook(lambda s: s["embed"]), levels=Q,
    )  # fmt: skip


def test_encodec_kmeans_init():
    core = peer_part("encodec.quantization.core_vq")
    x = torch.randn(K, D)[torch.arange(200) % K] * 8 + torch.randn(200, D) / 16
    made = []
    for patched in (False, True):
        torch.manual_seed(3)
        codebook = core.EuclideanCodebook(D, K, kmeans_init=True)
        if patched:
            fastvq.patch(codebook)
        torch.manual_seed(4)
        codebook.eval()(x)
        made.append(codebook)
    for a, b in zip(*(m.state_dict().values() for m in made), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_moshi():
    core = peer_part("moshi.quantization.core_vq")

    def make():
        made = core.ResidualVectorQuantization(num_quantizers=Q, codebook_offset=0, dim=D, codebook_size=K)
        for layer in made.layers:
            layer._codebook.embedding_sum.normal_()
            layer._codebook._initialized.fill_(1)
        return made

    def call(model, x):
        # What is cached does not follow a load_state_dict, in the peer as here.
        for layer in model.layers:
            layer._codebook._embedding = None
        return model(x)[:3]

    def codes(state):
        return state["embedding_sum"] / state["cluster_usage"].clamp(min=1e-5)[:, None]

    lockstep(make, sound, call, "EuclideanCodebook", by_codebook(codes), levels=Q)


@pytest.mark.parametrize("model, name", [("encodec", "Encodec"), ("xcodec", "Xcodec"), ("mimi", "Mimi")])
def test_transformers_residual(model, name):
    part = peer(f"transformers.models.{model}.modeling_{model}")
    cls = getattr(part, f"{name}ResidualVectorQuantiz" + ("ation" if model == "xcodec" else "er"))
    config = SimpleNamespace(
        codebook_size=K, codebook_dim=D, num_quantizers=Q, frame_rate=75, hidden_size=D,
        vector_quantization_hidden_dimension=D,
    )  # fmt: skip

    def make():
        made = cls(config)
        for name, buffer in made.named_buffers():
            if name.endswith(("embed", "embed_sum")):
                buffer.normal_()
        return made

    theirs, ours = make(), make()
    ours.load_state_dict(theirs.state_dict())
    report = fastvq.patch(ours, strict=True)
    # Each codebook, and the whole.
    assert len(report.replaced) == Q + 1
    for step in range(10):
        x = clear(sound(step), theirs)
        assert torch.equal(ours.encode(x), theirs.encode(x))


def clear(x, model):
    """The batch with rows left out whose indices float32 cannot decide at some level: those equal in float64."""
    with torch.no_grad():
        wide = model.double().encode(x.double())
        same = (wide == model.float().encode(x)).all(0).all(0)
    assert same.float().mean() > 0.9
    return x[..., same]


@pytest.mark.parametrize("train", [False, True])
def test_dac(train):
    cls = peer("transformers.models.dac.modeling_dac").DacVectorQuantize
    config = SimpleNamespace(codebook_dim=8, hidden_size=D, codebook_size=K)

    def look(module, x, outputs, state):
        latents = outputs[4].detach().movedim(1, -1).reshape(-1, 8)
        return Lookup(latents, state["codebook.weight"], outputs[3].flatten(), "cosine")

    lockstep(lambda: cls(config), sound, lambda m, x: m(x), cls.__name__, look, train=train)


def test_higgs(monkeypatch):
    if importlib.util.find_spec("torchaudio") is None:  # the file imports it; its quantizer needs none of it
        monkeypatch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
    part = peer("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    codebook = part.HiggsAudioV2TokenizerEuclideanCodebook(SimpleNamespace(codebook_size=K, codebook_dim=D))
    codebook.embed.normal_()
    x = sound(0).movedim(1, -1)
    before = codebook.encode(x)
    fastvq.patch(codebook, strict=True)
    assert torch.equal(codebook.encode(x), before)
