"""JPEGs that the decoder scales: the same picture as all pixels give, with a fraction of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.errors import BadImage
from clipkit.images.load import load_image


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours that tell left from right and top from bottom."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def mpo(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "MPO", save_all=True, append_images=[image])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "at_least", "expected"),
    [
        ((1600, 1200), 672, (1600, 1200)),  # half would be 600 high
        ((1600, 1344), 672, (800, 672)),
        ((4000, 3000), 672, (1000, 750)),
        ((4000, 3000), 100, (500, 375)),  # an eighth is the least
        ((4001, 3001), 672, (1001, 751)),
        ((300, 5000), 200, (300, 5000)),
    ],
)
def test_both_sides_keep_enough(size, at_least, expected):
    assert load_image(jpeg(picture(*size)), at_least=at_least).size == expected
    assert load_image(jpeg(picture(*size))).size == size


FILES = {
    "plain": lambda: jpeg(picture(1200, 800)),
    "progressive": lambda: jpeg(picture(1200, 800), progressive=True),
    "grey": lambda: jpeg(picture(1200, 800, "L")),
    "cmyk": lambda: jpeg(picture(1200, 800, "CMYK")),
    "subsampled": lambda: jpeg(picture(1200, 800), subsampling=2),
    "mpo": lambda: mpo(picture(1200, 800)),
    **{
        f"orientation {value}": lambda value=value: jpeg(picture(1200, 800), exif=orientation(value))
        for value in range(1, 9)
    },
}


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("name", FILES)
def test_it_is_the_same_picture(name):
    data = FILES[name]()
    exact, scaled = load_image(data), load_image(data, at_least=300)
    assert scaled.mode == "RGB"
    assert scaled.size == tuple(side // 2 for side in exact.size)
    expected = np.asarray(exact.resize(scaled.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(scaled, dtype=float) - expected).mean() < 1.5


def test_other_formats_are_decoded_in_full():
    buffer = io.BytesIO()
    picture(1200, 800).save(buffer, "PNG")
    assert load_image(buffer.getvalue(), at_least=100).size == (1200, 800)
    assert load_image(picture(1200, 800), at_least=100).size == (1200, 800)


def test_limits_are_those_of_the_full_size():
    data = jpeg(picture(1200, 800))
    with pytest.raises(BadImage, match="TOO_LARGE"):
        load_image(data, at_least=100, max_pixels=900_000)
    with pytest.raises(BadImage, match="TRUNCATED"):
        load_image(data[: len(data) // 2], at_least=100)


def test_a_file_is_scaled_like_its_bytes(tmp_path: Path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(picture(1200, 800)))
    assert np.array_equal(load_image(path, at_least=200), load_image(path.read_bytes(), at_least=200))
