"""Patches two models that were not written for fastvq, and compares their indices before and after.

The first is a residual quantizer of vector-quantize-pytorch. The second is transformers' audio codec Encodec, made from
its config with random weights, so nothing is downloaded. For each model the script prints what was patched, the share
of equal indices before and after, and the time of one call before and after. Where float32 cannot tell two codes apart,
a few indices in 10,000 differ: fastvq's is the nearer code in float64. At the later levels of such a vector the two
sides quantize different residuals, so indices differ there without a near-tie.

    pip install vector-quantize-pytorch transformers
    python examples/patch_your_model.py
"""

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch

import fastvq


def compare(model: torch.nn.Module, indices: Callable[[], torch.Tensor], repeats: int) -> None:
    """Calls the model, patches it and calls it again."""
    before, slow = timed(indices, repeats)
    report = fastvq.patch(model)
    after, fast = timed(indices, repeats)
    print(report)
    equal = (before == after).float().mean().item()
    print(f"indices equal: {equal:.2%}; one call: {slow * 1e3:.1f} ms before, {fast * 1e3:.1f} ms after")


@torch.no_grad()
def timed(call: Callable[[], torch.Tensor], repeats: int) -> tuple[torch.Tensor, float]:
    """The result of a call and the shortest of several times, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, min(times)


def residual_quantizer(n_vectors: int, repeats: int) -> None:
    from vector_quantize_pytorch import ResidualVQ

    model = ResidualVQ(dim=64, codebook_size=512, num_quantizers=4).eval()
    x = torch.randn(1, n_vectors, 64)
    compare(model, lambda: model(x)[1], repeats)


def encodec(n_samples: int, repeats: int) -> None:
    from transformers import EncodecConfig, EncodecModel

    # A small codec: one second of sound becomes 75 positions of 8 ids each. With a real checkpoint, call
    # EncodecModel.from_pretrained instead; the rest stays the same.
    config = EncodecConfig(num_filters=8, hidden_size=64, codebook_dim=64, codebook_size=1024, target_bandwidths=[6.0])
    model = EncodecModel(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed"):
            buffer.normal_()  # a checkpoint would fill the codebooks
    sound = torch.randn(1, 1, n_samples)
    compare(model, lambda: model.encode(sound, bandwidth=6.0).audio_codes, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small inputs, for a test")
    short = parser.parse_args().short
    torch.manual_seed(0)
    for package, run in (
        ("vector_quantize_pytorch", lambda: residual_quantizer(500 if short else 16384, 1 if short else 5)),
        ("transformers", lambda: encodec(2400 if short else 240_000, 1 if short else 5)),
    ):
        print(f"\n{package}")
        if importlib.util.find_spec(package) is None:
            print(f"not installed: pip install {package.replace('_', '-')}")
        else:
            run()


if __name__ == "__main__":
    main()
