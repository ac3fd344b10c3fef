"""Which way up an image is, wherever its file says so."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

from PIL import Image

_TAG = 0x0112

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadExif(Exception):
    """The EXIF block is damaged."""


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned or mirrored as an orientation of 2 to 8 asks for; as it is for any other number."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def exif_orientation(info: Mapping[str | tuple[int, int], Any]) -> int | None:
    """EXIF tag 0x0112 of the first directory (EXIF 2.3, 4.6.4) of Pillow's `info`; None where there is none.

    It stands in ``exif``, or in hex in the text that ImageMagick writes into a PNG. Read by hand: Pillow's reader
    warns and raises on damage in tags that do not matter here.

    Raises:
        BadExif: it cannot be read.
    """
    exif = info.get("exif")
    try:
        if exif is None and isinstance(profile := info.get("Raw profile type exif"), str):
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        return _first_directory(exif) if isinstance(exif, bytes) and exif else None
    except (KeyError, ValueError, struct.error) as error:
        raise BadExif from error


def _first_directory(exif: bytes) -> int | None:
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}[exif[:4]]
    (start,) = struct.unpack_from(order + "I", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", exif, entry)
        if tag == _TAG:
            return int(struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], exif, entry + 8)[0])
    return None


def xmp_orientation(info: Mapping[str | tuple[int, int], Any]) -> int | None:
    """The tiff:Orientation of an XMP packet in Pillow's `info`; None where there is none."""
    if not (xmp := info.get("XML:com.adobe.xmp") or info.get("xmp")):
        return None
    text = xmp if isinstance(xmp, bytes) else str(xmp).encode("utf-8", "replace")
    match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', text)
    return int(match[1]) if match else None
