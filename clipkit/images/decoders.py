"""Encoded bytes to Pillow images whose header is read and whose pixels are not, and where Pillow would misread them.

The decoder classes are called directly: `Image.open` guesses by trying every format, and warns about large images
through the process-wide warning filters.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImagePalette,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

_BITS, _PHOTOMETRIC, _STRIP_BYTES, _PLANAR, _COLOURS = 258, 262, 279, 284, 320  # tags of TIFF 6.0


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Not wanted here, and on broken EXIF it warns."""


def _heif(file: io.BytesIO) -> Image.Image:
    from pillow_heif import HeifImageFile  # an extra; not registered with Pillow, which belongs to the user's process

    image: Image.Image = HeifImageFile(file)  # type: ignore[no-untyped-call]
    return image


_CLASSES: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": _Jpeg,  # also for MPO: its first frame is a plain JPEG
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "HEIF": _heif,
}


def opened(kind: str, data: bytes) -> Image.Image:
    """The image, its header read. Its `load` is what decodes.

    Args:
        kind: as `clipkit.images.signatures.signature` names it.

    Raises:
        Exception: anything, as decoders do.
    """
    image = _CLASSES[kind](io.BytesIO(data))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _mend_tiff(image)
    return image


def _mend_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Changes how the pixels are going to be unpacked where Pillow's own reader gives noise or black."""
    tags, tiles = image.tag_v2, image.tile
    bits = max(tags.get(_BITS, (1,)))
    raw = bool(tiles) and tiles[0].codec_name == "raw"
    if raw and tags.get(_PLANAR) == 2 and bits == 16:
        image.tile = [tile._replace(args=(_plane(image, tile), 0, 1)) for tile in tiles]
    elif raw and tags.get(_PHOTOMETRIC) == 6 and image.mode == "RGB":  # four bytes a pixel, where there are three
        width, height = image._tile_size
        if sum(tags.get(_STRIP_BYTES, ())) != 3 * width * height:
            raise SyntaxError("unknown pixel mode: subsampled YCbCr, not compressed")
        image._mode = "YCbCr"
        image.tile = [tile._replace(args=("YCbCr", 0, 1)) for tile in tiles]
    if image.mode in ("P", "PA") and max(colours := tags[_COLOURS]) < 256:  # a palette of 8 bits, where TIFF has 16
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _plane(image: TiffImagePlugin.TiffImageFile, tile: ImageFile._Tile) -> str:
    """How to unpack one plane of 16-bit samples; Pillow takes the first letter of its mode, which is for 8 bits."""
    if image.mode.startswith("I;16"):
        return image.mode
    if image.mode not in ("RGB", "RGBA") or not isinstance(tile.args, tuple):
        raise SyntaxError(f"unknown pixel mode: planes of {image.mode} in 16 bits")
    return f"{tile.args[0]};16{'L' if image.tag_v2.prefix == b'II' else 'B'}"


def wide_netpbm(image: Image.Image, data: bytes) -> tuple[np.ndarray[Any, Any], int] | None:
    """The samples, (H, W) or (H, W, 3), and the largest possible one of a binary PGM or PPM of two bytes a sample.

    Pillow reads it in a Python loop, and in colour without the low bytes. None if it is of another kind, or cut short.
    """
    assert isinstance(image, ImageFile.ImageFile)
    tile = image.tile[0]
    maxval = 65535 if tile.args == "I;16B" else 255
    if tile.codec_name == "ppm" and isinstance(tile.args, tuple):
        maxval = int(tile.args[-1])
    shape = (image.height, image.width, *([3] if image.mode == "RGB" else []))
    if maxval < 256 or len(data) - tile.offset < 2 * math.prod(shape):
        return None
    samples = np.frombuffer(data, ">u2", math.prod(shape), tile.offset).reshape(shape)
    return np.minimum(samples, maxval), maxval
