"""What stands in an image file beside its pixels: read where it matters, left out where it would only cost an image."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

Info: TypeAlias = "dict[str | tuple[int, int], Any]"
_TEXT = 4 * 1024**2  # bytes of one text that are unpacked, of whatever size it is: what is looked for stands in front
_KEYS = (b"Raw profile type exif", b"XML:com.adobe.xmp")


def bare_png(data: bytes) -> tuple[bytes, Info]:
    """A PNG without what its pixels do not need, and what is worth knowing of that, as Pillow's `info` names it.

    Only critical chunks and tRNS are kept: Pillow refuses pixels for a large text or profile, or a wrong checksum of
    either. Frames of an animation after the first go, too.

    Returns:
        The bytes, those passed in if there is nothing to leave out; and of ``exif``, ``Raw profile type exif``,
        ``xmp`` and ``sBIT`` (significant bits of a sample: PNG 1.2, 4.2.4.3) those that are there.
    """
    info: Info = {}
    texts: dict[bytes, tuple[bytes, bytes]] = {}
    view, start, place = memoryview(data), 0, 8
    kept: list[memoryview] = []
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            break  # cut short: the decoder says so
        if name[:1].islower() and name != b"tRNS":  # an ancillary chunk
            kept.append(view[start:place])
            start = end
            if name == b"eXIf":
                info["exif"] = b"Exif\0\0" + data[place + 8 : end - 4]
            elif name == b"sBIT":
                info["sBIT"] = max(data[place + 8 : end - 4], default=0)
            else:
                texts |= {key: (name, data[place + 8 : end - 4]) for key in _KEYS if _has_key(data, place, name, key)}
        place = end
        if name == b"IEND":
            break
    for key, (name, body) in texts.items():
        text = _text(name, body[len(key) + 1 :])
        info["xmp" if key == _KEYS[1] else key.decode()] = text if key == _KEYS[1] else text.decode("latin-1")
    return (b"".join([*kept, view[start:]]) if kept else data), info


def _has_key(data: bytes, place: int, name: bytes, key: bytes) -> bool:
    return name in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(key + b"\0", place + 8)


def _text(name: bytes, body: bytes) -> bytes:
    """What follows the key in a tEXt, zTXt or iTXt chunk (PNG 1.2, 4.2.3), unpacked."""
    if name == b"zTXt":
        return _unpacked(body[1:])
    if name == b"tEXt":
        return body
    _language, _key, text = [*body[2:].split(b"\0", 2), b"", b""][:3]
    return _unpacked(text) if body[:1] == b"\1" else text


def _unpacked(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _TEXT)
    except zlib.error:
        return b""


def bare_jpeg(data: bytes) -> bytes:
    """A JPEG without the segments that its pixels do not need; colour, EXIF and XMP stay where they are whole."""
    view, start, place = memoryview(data), 0, 2
    kept: list[memoryview] = []
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xDA:  # the scan begins
            break
        if marker == 0xFF:  # padding
            place += 1
            continue
        needs = {0xE0: 16, 0xE1: 0, 0xEE: 14}.get(marker, 2**16 if 0xE0 <= marker <= 0xEF or marker == 0xFE else 0)
        if length < needs:
            kept.append(view[start:place])
            start = place + 2 + length
        place += 2 + length
    return b"".join([*kept, view[start:]])


def bare_avif(data: bytes) -> bytes:
    """An AVIF whose EXIF item has a name that no reader looks for: libavif refuses pixels for a damaged one."""
    return data.replace(b"Exif", b"skip", 1)


# How to save the pixels of a file that was refused for something else.
WITHOUT_METADATA: dict[str, Callable[[bytes], bytes]] = {"JPEG": bare_jpeg, "AVIF": bare_avif}
