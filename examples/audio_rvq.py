"""Compresses synthetic sounds with a residual quantizer, as neural audio codecs do.

The sounds are sums of a few decaying tones. Frames of 64 samples are transformed by a cosine transform, a stand-in for
a codec's encoder, and ``fastvq.nn.ResidualVQ`` gives each frame one id a level: each level quantizes what the levels
before it left over. A receiver may stop after any level. The script prints, for each number of levels, the bit rate and
the signal-to-noise ratio of sounds that were not trained on. A larger ratio is better.

    python examples/audio_rvq.py
"""

import argparse
import math

import torch
from torch import Tensor

from fastvq.nn import ResidualVQ

RATE, FRAME = 8000, 64  # samples a second, samples a frame
N_CODES, N_LEVELS = 256, 6


def sounds(n: int, seconds: float, generator: torch.Generator) -> Tensor:
    """[n, samples]: each sound has four tones with their own pitch, loudness and decay."""
    t = torch.arange(int(seconds * RATE)) / RATE
    pitch, loudness, decay, phase = torch.rand(4, n, 4, 1, generator=generator)
    tones = torch.sin(2 * math.pi * (100 + 1500 * pitch) * t + 2 * math.pi * phase)
    return (loudness * torch.exp(-8 * decay * t) * tones).sum(1)


def cosine_transform(size: int) -> Tensor:
    """[size, size], orthonormal: DCT-II. Its transpose is its inverse."""
    k, i = torch.arange(size)[:, None], torch.arange(size)[None]
    matrix = torch.cos(math.pi * k * (2 * i + 1) / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few steps, for a test")
    short = parser.parse_args().short

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    transform = cosine_transform(FRAME)
    n_sounds = 8 if short else 200
    frames = sounds(n_sounds, 1.0, generator).view(-1, FRAME) @ transform.T  # [frames, 64]
    test = sounds(8, 1.0, generator).view(-1, FRAME) @ transform.T

    quantizer = ResidualVQ(FRAME, N_CODES, N_LEVELS, kmeans_init=True, decay=0.95, dead_code_threshold=0.5)
    for _ in range(2 if short else 100):  # codebooks learn in each forward; there is nothing else to train
        quantizer(frames[torch.randperm(len(frames), generator=generator)[:8192]])

    quantizer.eval()
    ids = quantizer.encode(test)  # [frames, levels]
    print(f"{len(test)} frames become ids {list(ids.shape)} of {N_CODES} codes a level")
    for levels in range(1, N_LEVELS + 1):
        # The transform keeps lengths, so the error of the frames is the error of the sound.
        error = test - quantizer.decode(ids[:, :levels])
        ratio = 10 * torch.log10(test.square().sum() / error.square().sum())
        bits = levels * math.log2(N_CODES) * RATE / FRAME
        print(f"{levels} levels: {bits / 1000:.1f} kbit/s, signal to noise {ratio:.1f} dB")


if __name__ == "__main__":
    main()
