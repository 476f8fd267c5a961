"""Trains a small VQ-VAE in a plain PyTorch loop, on 4,500 handwritten digits.

The encoder and the decoder are ordinary convolutions. ``fastvq.nn.VectorQuantizer`` stands between them: it replaces
each vector by its nearest code and, in training, moves the codes toward the vectors that chose them. The script prints
the loss every hundred steps, then the quality of held-out digits (PSNR, in dB) and the share of codes in use. It writes
digits and their reconstructions to a picture.

    pip install ".[models]"
    python examples/train_vqvae.py
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastvq.data import Digits, normalise, psnr, to_pixels
from fastvq.nn import VectorQuantizer


class SmallVQVAE(nn.Module):
    """28 x 28 pixels -> 7 x 7 codes -> 28 x 28 pixels."""

    def __init__(self, n_codes: int = 128, code_dim: int = 16, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(width, code_dim, 3, padding=1),
        )  # fmt: skip
        # k-means on the first batch starts the codebook. A code that is hardly chosen is replaced by a vector.
        self.quantizer = VectorQuantizer(
            code_dim, n_codes, kmeans_init=True, dead_code_threshold=2.0, channel_first=True
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, width, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, commitment loss, ids [B, 7, 7])."""
        q = self.quantizer(self.encoder(image))
        return self.decoder(q.quantized), q.commitment_loss, q.indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/train_vqvae.png"), help="digits above reconstructions")
    parser.add_argument("--short", action="store_true", help="few steps, for a test")
    options = parser.parse_args()
    steps = 20 if options.short else 1000

    torch.manual_seed(0)
    train, held_out = normalise(Digits("train").pixels), normalise(Digits("held-out").pixels)
    model = SmallVQVAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        image = train[torch.randint(len(train), (64,))]
        reconstruction, commitment, _ = model(image)
        loss = F.mse_loss(reconstruction, image) + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        reconstruction, _, ids = model(held_out)
    print(f"held-out digits: {psnr(held_out, reconstruction).mean():.1f} dB")
    print(f"codes in use: {ids.unique().numel()} of {model.quantizer.n_codes}")

    rows = [torch.cat(list(images[:12]), dim=-1) for images in (held_out, reconstruction)]
    pixels = to_pixels(torch.cat(rows, dim=-2))[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).resize((12 * 56, 2 * 56)).save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
