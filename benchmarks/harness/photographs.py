"""The photographs that scikit-image carries, cut into patches and put together again."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Only files that the package itself holds: nothing is downloaded.
FILES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png")
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601


# Top left corner of the square that is shown, where its middle is not the best of a photograph; multiples of 4.
CORNERS = {"astronaut": (0, 96), "coffee": (64, 120), "rocket": (120, 192)}


@dataclass(frozen=True)
class Photograph:
    name: str
    pixels: np.ndarray  # [H, W, 3] float32 in 0 .. 1, H and W multiples of 8


def unavailable() -> str | None:
    if importlib.util.find_spec("skimage") is None:
        return 'photographs: scikit-image is not installed; pip install -e ".[bench]"'
    return None if _paths() else "photographs: this scikit-image carries none of the files that are used"


def _paths() -> list[Path]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [folder / name for name in FILES if (folder / name).exists()]


def load() -> list[Photograph]:
    from skimage.io import imread

    photographs = []
    for path in _paths():
        pixels = imread(path)[..., :3].astype(np.float32) / 255
        height, width = (size // 8 * 8 for size in pixels.shape[:2])
        photographs.append(Photograph(path.stem.partition("_")[0], np.ascontiguousarray(pixels[:height, :width])))
    return photographs


def cut(pixels: np.ndarray, side: int) -> np.ndarray:
    """[H, W, C] -> patches [H/side * W/side, side*side*C], row by row."""
    height, width, channels = pixels.shape
    grid = pixels.reshape(height // side, side, width // side, side, channels)
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4)).reshape(-1, side * side * channels)


def join(patches: np.ndarray, shape: tuple[int, int, int], side: int) -> np.ndarray:
    """The inverse of ``cut``."""
    height, width, channels = shape
    grid = patches.reshape(height // side, width // side, side, side, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(shape)


def patches(kind: str) -> np.ndarray:
    """All photographs' patches: kind ``4x4x3`` in colour [N, 48] or ``8x8`` in grey [N, 64]."""
    if kind == "4x4x3":
        return np.concatenate([cut(p.pixels, 4) for p in load()])
    return np.concatenate([cut((p.pixels @ GREY)[..., None], 8) for p in load()])


def psnr(pixels: np.ndarray, approximation: np.ndarray) -> float:
    """10 log10(1 / mean squared error), in dB, of pixels in 0 .. 1."""
    return float(-10 * np.log10(np.mean((pixels - approximation) ** 2, dtype=np.float64)))
