"""What a file is, by its first bytes, never by its name; and whether its end is missing."""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

from PIL import features


class Signature(NamedTuple):
    """A format that is read (`code` empty, `name` the format), or why not (`name` says what it is instead)."""

    name: str
    code: str = ""
    fix: str | None = None


_AGAIN = "the download failed: fetch the file again"
_CONVERT = "convert it to JPEG or PNG"

_OTHER_IMAGES = {
    b"%PDF": "a PDF document",
    b"%!PS": "EPS or PostScript",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"8BPS": "a Photoshop file",
    b"\0\0\1\0": "a Windows icon",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL": "JPEG XL",
    b"DDS ": "a DirectDraw surface",
    b"Pf\n": "a float map (PFM)",
    b"PF\n": "a float map (PFM)",
    b"qoif": "QOI",
}

_OTHER_FILES = {
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "a gzip file",
    b"\x93NUMPY": "a NumPy array",
    b"PAR1": "a Parquet table",
    b"ID3": "an MP3 file",
    b"\x1aE\xdf\xa3": "a WebM or Matroska video",
}

_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"mif2", b"msf1"}

_TEXTS = {
    "an HTML page": (b"<!doctype", b"<html", b"<head", b"<body"),
    "XML": (b"<?xml", b"<"),
    "JSON": (b"{", b"["),
}


def signature(data: bytes) -> Signature:
    """The format of an encoded image; 512 bytes are enough."""
    head = data[:32]
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return Signature("PNG")
    if head.startswith(b"\xff\xd8\xff"):
        return Signature("JPEG")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Signature("WEBP")
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return Signature("GIF")
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return Signature("TIFF")
    if re.match(rb"P[1-6][\s#]", head):
        return Signature("PPM")
    if head[4:8] == b"ftyp":
        return _iso_media(data)
    if head[:2] == b"BM" and len(data) >= 26:
        return Signature("BMP")
    return _not_read(data)


def ends_early(data: bytes, kind: str) -> bool:
    """Whether the mark that closes a file of this kind is missing; meant for files that failed to decode."""
    if kind == "JPEG":
        return b"\xff\xd9" not in data[-1024:]
    if kind == "PNG":
        return b"IEND" not in data[-1024:]
    if kind == "GIF":
        return b";" not in data[-16:]
    if kind == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    return False


def _iso_media(data: bytes) -> Signature:
    brands = data[8 : min(64, int.from_bytes(data[:4]))]
    if b"avif" in brands or b"avis" in brands:
        if features.check("avif"):
            return Signature("AVIF")
        return Signature("this Pillow was built without AVIF", "FORMAT", "install a Pillow wheel with AVIF")
    if any(brands[place : place + 4] in _HEIF for place in range(0, len(brands), 4)):
        return Signature("HEIF")
    return Signature("this is a video (MP4 family), not an image", "NOT_IMAGE")


def _not_read(data: bytes) -> Signature:
    text = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return Signature("this is a Git LFS pointer, not an image", "NOT_IMAGE", "run: git lfs pull")
    if b"<svg" in text:
        return Signature("this is an SVG drawing, which is not read", "FORMAT", "render it to PNG")
    for magic, name in _OTHER_IMAGES.items():
        if data.startswith(magic):
            return Signature(f"this is {name}, which is not read", "FORMAT", _CONVERT)
    for magic, name in _OTHER_FILES.items():
        if data.startswith(magic):
            return Signature(f"this is {name}, not an image", "NOT_IMAGE")
    for name, starts in _TEXTS.items():
        if text.startswith(starts):
            return Signature(f"this is {name}, not an image", "NOT_IMAGE", _AGAIN)
    if not data[:512].strip(b"\0"):
        return Signature("these are zero bytes, not an image", "NOT_IMAGE", "copy or download it again")
    if _is_text(data[:512]):
        return Signature(f"this is text, not an image: it begins {data[:24]!r}", "NOT_IMAGE")
    return Signature(f"not a known image format: it begins {data[:8].hex(' ')}", "NOT_IMAGE")


def _is_text(data: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)  # a character cut at the end is fine
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c.isspace() for c in text)
