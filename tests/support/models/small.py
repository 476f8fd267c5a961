"""Small pictures and small models, so that a training takes a second."""

import numpy as np
import torch

from fastvq.data import Picture, Source, normalise
from fastvq.models import VQVAE, VQVAE2


class Squares(Source):
    """Bright squares on dark ground; the label is the quarter of the picture that a square's corner lies in."""

    name, n_classes = "squares", 4

    def __init__(self, n=64, size=16, channels=1, bad=()):
        super().__init__("all")
        self.n, self.size, self.channels, self.bad = n, size, channels, set(bad)

    def __len__(self):
        return self.n

    def read(self, index):
        from fastvq.data import BadPicture

        if index in self.bad:
            raise BadPicture(f"square-{index}", "made to be bad")
        rng = np.random.default_rng(index)
        y, x = rng.integers(self.size - 4, size=2)
        pixels = torch.zeros(self.channels, self.size, self.size, dtype=torch.uint8)
        colours = torch.from_numpy(rng.integers(100, 256, self.channels).astype(np.uint8))
        pixels[:, y : y + 5, x : x + 5] = colours[:, None, None]
        half = self.size // 2
        return Picture(f"square-{index}", pixels, int(y >= half) * 2 + int(x >= half))


def pictures(n, size=16, channels=1):
    source = Squares(n, size, channels)
    return normalise(torch.stack([source.read(i).pixels for i in range(n)]))


def small_vqvae(seed=0, **options):
    torch.manual_seed(seed)
    return VQVAE(options.pop("channels", 1), 8, 16, 4, options.pop("downsample", 4), n_blocks=1, **options)


def small_vqvae2(seed=0, **options):
    torch.manual_seed(seed)
    return VQVAE2(options.pop("channels", 1), 8, options.pop("codes", 16), 4, 2, n_blocks=1, **options)
