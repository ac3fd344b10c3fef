"""More than 8 bits a sample, brought down to 8 by the range that the file declares, or else by its values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageFile

Array: TypeAlias = np.ndarray[Any, Any]
_BITS, _PHOTOMETRIC, _MAX, _PLANAR, _MIN_SAMPLE, _MAX_SAMPLE = 258, 262, 281, 284, 340, 341  # tags of TIFF 6.0
_DARK = 64  # the high byte of a 16-bit value stays below it if the value has 14 bits or fewer


class UnknownRange(Exception):
    """The values go beyond 16 bits, or are floats, and nothing says what is white."""


class Shades(NamedTuple):
    """An 8-bit image, and what had to be guessed about its range; empty if nothing was."""

    image: Image.Image
    guess: str = ""


class _Range(NamedTuple):
    low: float
    high: float
    guess: str = ""


def grey(image: Image.Image) -> Shades:
    """An image of mode I, I;16 or F in mode L; TIFF's white-is-zero is turned, a transparent value is white.

    Raises:
        UnknownRange: as above.
    """
    values = np.asarray(image)
    value_range = _range(image, values)
    shades = _eight_bits(values, value_range)
    if (tags := getattr(image, "tag_v2", None)) is not None and tags.get(_PHOTOMETRIC, 0) == 0:
        shades = 255 - shades
    if isinstance(key := image.info.get("transparency"), int):
        shades[values == key] = 255
    return Shades(Image.fromarray(shades), value_range.guess)


def netpbm(values: Array, maxval: int) -> Shades:
    """(H, W) or (H, W, 3) samples of a PGM or PPM, which declares its range; 65,535 is what writers put for any."""
    value_range = _guessed(values) if maxval == 65535 else _Range(0, maxval)
    return Shades(Image.fromarray(_eight_bits(values, value_range)), value_range.guess)


def is_dark(image: Image.Image, rawmode: str) -> bool:
    """Whether an image that was read by the high bytes of its 16-bit samples may hold fewer bits than that.

    Args:
        image: as Pillow read it.
        rawmode: how (`rawmode_of`, before it was loaded).
    """
    if not rawmode.split(";")[-1].startswith("16") or image.mode not in ("RGB", "RGBA", "CMYK"):
        return False
    colours = image.convert("RGB") if image.mode == "RGBA" else image
    return all(band.getextrema()[1] < _DARK for band in colours.split())  # type: ignore[operator]


def lightened(image: Image.Image, rawmode: str, again: Callable[[], Image.Image]) -> Shades:
    """The image by all of its bits.

    Args:
        image: by the high bytes.
        rawmode: of it, as in `is_dark`.
        again: opens the file anew.

    Raises:
        UnknownRange: the low bytes cannot be had.
    """
    low = again()
    packed_planes = rawmode.endswith("N") and getattr(low, "tag_v2", {}).get(_PLANAR) == 2  # libtiff knows one order
    if not isinstance(low, ImageFile.ImageFile) or rawmode not in _LOW or packed_planes:
        raise UnknownRange(f"16-bit samples of {rawmode} hold small values only")
    low.tile = [tile._replace(args=_swapped(tile.args)) for tile in low.tile]
    low.load()
    samples = np.asarray(low).astype(np.uint16)
    if rawmode == "LA;16B":
        grey_values, alpha = samples[..., 0] << 8 | samples[..., 1], samples[..., 2] << 8 | samples[..., 3]
        values = np.stack([grey_values, grey_values, grey_values, alpha], axis=-1)
    else:
        values = np.asarray(image).astype(np.uint16) << 8 | samples
    colours = 3 if image.mode == "RGBA" else values.shape[-1]
    value_range = _range(image, values[..., :colours])
    parts = [_eight_bits(values[..., :colours], value_range)]
    if image.mode == "RGBA":
        parts.append(_eight_bits(values[..., 3:], _guessed(values[..., 3:])))
    shades = np.concatenate(parts, axis=-1)
    if isinstance(key := image.info.get("transparency"), tuple):
        shades[(values == key).all(-1)] = 255
    return Shades(Image.frombytes(image.mode, image.size, shades.tobytes()), value_range.guess)


_OTHER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_UNPACKED = ("RGB", "RGBA", "RGBX", "CMYK", *"RGBA")


# To read the other byte of each sample, ask for the other byte order. Grey with alpha is taken as four bytes: grey's
# high and low one, then alpha's.
_LOW = {f"{mode};16{order}": f"{mode};16{other}" for mode in _UNPACKED for order, other in _OTHER.items()}
_LOW["LA;16B"] = "RGBA"


def _swapped(args: Any) -> Any:
    return (_LOW[args[0]], *args[1:]) if isinstance(args, tuple) else _LOW[args]


def rawmode_of(image: Image.Image) -> str:
    """How Pillow is going to unpack the pixels of a file that is not loaded yet; empty if it does not say."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _eight_bits(values: Array, value_range: _Range) -> Array:
    bits = int(value_range.high + 1).bit_length() - 1
    if value_range.low == 0 and value_range.high == 2**bits - 1 and bits >= 8 and values.dtype.kind in "iu":
        return (values >> (bits - 8)).astype(np.uint8)
    return np.rint((values - value_range.low) * (255 / (value_range.high - value_range.low))).astype(np.uint8)


def _range(image: Image.Image, values: Array) -> _Range:
    declared = _declared(image, values)
    if declared and declared.low <= values.min() and values.max() <= declared.high:
        return declared
    if image.mode == "F":
        raise UnknownRange("float pixels have no known range")
    return _guessed(values)


def _guessed(values: Array) -> _Range:
    most = int(values.max())
    if values.min() < 0 or most > 65535:
        raise UnknownRange("32-bit pixels beyond 0..65535 have no known range")
    bits = next(bits for bits in (8, 10, 12, 14, 16) if most < 2**bits)
    if bits == 16 or most == 0:
        return _Range(0, 65535)
    return _Range(0, 2**bits - 1, f"16-bit samples go up to {most:,} only: they are read as {bits}-bit values")


def _declared(image: Image.Image, values: Array) -> _Range | None:
    if image.format == "PPM":  # of text: Pillow has scaled it by its own maximum
        return _Range(0, 65535)
    if (tags := getattr(image, "tag_v2", None)) is not None:
        low, high = _number(tags.get(_MIN_SAMPLE), min), _number(tags.get(_MAX_SAMPLE) or tags.get(_MAX), max)
        bits = _number(tags.get(_BITS), max)
        if high is None and bits is not None and bits < 16:
            high = 2**bits - 1
        return _Range(low or 0, high) if high not in (None, 65535) and high > (low or 0) else None
    bits = image.info.get("sBIT")
    if not bits or bits > 16:
        return None
    # PNG asks writers to shift samples up to 16 bits; many do not
    shifted = bits == 16 or not (values & (2 ** (16 - bits) - 1)).any() or values.max() >= 2**bits
    return _Range(0, 65535 if shifted else 2**bits - 1)


def _number(value: Any, pick: Callable[[Any], Any]) -> float | None:
    number = pick(value) if isinstance(value, tuple) and value else value
    return float(number) if isinstance(number, (int, float)) and np.isfinite(number) else None
