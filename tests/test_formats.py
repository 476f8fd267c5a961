"""Formats of pictures: the documented ones alone, and numbers of any width scaled or refused, never black."""

import io

import numpy as np
import pytest
from PIL import Image

from fastvq.data import BadPicture, ImageFolder, read_picture
from fastvq.data.sources import EXTENSIONS

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def encoded(values, form="tiff"):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


def read(data, odd="convert", channels=1):
    return read_picture(data, "x", channels=channels, size=None, odd=odd)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_other_formats_under_a_known_name_are_not_opened(tmp_path, name, monkeypatch):
    from PIL import EpsImagePlugin

    def never(*_, **__):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    for form in ("eps", "pcx", "tga", "ico", "avif"):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(buffer, form)
        (tmp_path / name).write_bytes(buffer.getvalue())
        source = ImageFolder(tmp_path, "all", size=16)
        assert source.get(0) is None and "no picture of a known format (PNG, JPEG," in source.skipped[name], form


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_documented_extension_is_read(extension):
    buffer = io.BytesIO()
    Image.new("L", (16, 16), 77).save(buffer, Image.registered_extensions()[extension])
    assert abs(int(read(buffer.getvalue()).float().mean()) - 77) <= 1


@pytest.mark.parametrize(
    "values, low, high",
    [
        ((RAMP * 65535).astype(np.uint16), 0, 255),
        ((RAMP * 4095).astype(np.uint16), 0, 255),  # 12 bits of a camera
        ((RAMP * 200).astype(np.uint16), 0, 200),  # 8 bits in 16
        ((RAMP * 200).astype(np.int32), 0, 200),
        ((RAMP * (2**31 - 1)).astype(np.int32), 0, 255),
        ((RAMP * 200 - 100).astype(np.int32), 0, 255),
        (np.full((16, 16), 7, np.int32), 7, 7),
        (RAMP.astype(np.float32), 0, 255),
        ((RAMP * 255).astype(np.float32), 0, 255),
        ((RAMP * 1e-3).astype(np.float32) + 0.5, 128, 128),
        ((RAMP * 2 - 1).astype(np.float32), 0, 255),
        ((RAMP * 1e30).astype(np.float32), 0, 255),
    ],
)
def test_wide_numbers_are_scaled(values, low, high):
    pixels = read(encoded(values))
    assert (int(pixels.min()), int(pixels.max())) == (low, high)
    with pytest.raises(BadPicture, match=r"odd: (16|32) bits a channel"):
        read(encoded(values), odd="skip")


def test_unsigned_numbers_of_32_bits_keep_their_order():
    data = bytearray(encoded((RAMP * (2**31 - 1)).astype(np.int32)))
    with Image.open(io.BytesIO(data)) as picture:
        offset = picture.tag_v2[273][0]
    values = (RAMP * (2**32 - 1)).astype("<u4")
    data[offset : offset + 1024] = values.tobytes()
    entry = data.index((339).to_bytes(2, "little"))  # SampleFormat, whose value follows its type and its count
    data[entry + 8] = 1
    pixels = read(bytes(data)).flatten().int()
    assert pixels[0] == 0 and pixels[-1] == 255 and (pixels.diff() >= 0).all()


@pytest.mark.parametrize(
    "data, reason",
    [
        (encoded(np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32)), "NaN or infinity"),
        (encoded(np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32)), "NaN or infinity"),
        (encoded((RAMP * 200).astype(np.uint16), "png"), "black: of 16 bits a channel"),
        (encoded((RAMP * 200).astype(np.uint16), "ppm"), "black: of 16 bits a channel"),
        (encoded(np.full((16, 16), -3, np.int32)), "none is above 0"),
    ],
)
def test_numbers_that_would_be_black_are_refused(data, reason):
    with pytest.raises(BadPicture, match=reason):
        read(data)
