"""The one door through which image bytes come in.

`load_image` turns whatever a user has (a path, bytes, a PIL image, an array, an undecoded `datasets` image) into an RGB
PIL image under one policy, and whatever cannot be used into a `BadImage` that carries one of the codes below:

    MISSING      no such file                             TRUNCATED    the file ends before the image does
    URL          clipkit never downloads images           CORRUPT      the decoder refused it
    NOT_REGULAR  a folder, FIFO, socket or device         TOO_LARGE    more bytes or pixels than allowed
    UNREADABLE   permission or I/O error                  TOO_SMALL    a side shorter than `min_side`
    EMPTY        no bytes, or no image in the cell        ASPECT       longer than `max_aspect` times its width
    NOT_IMAGE    HTML, JSON, a Git LFS pointer ...        FORMAT       an image, but of a kind that is not read

Neither `Image.MAX_IMAGE_PIXELS` nor `ImageFile.LOAD_TRUNCATED_IMAGES` is read as policy or ever set: both belong to the
user's process. The decoder classes are called directly, because `Image.open` guesses by trying every format and warns
about large images through the process-wide warning filters.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from clipkit.errors import BadImage
from clipkit.paths import Tree, did_you_mean, is_url, show
from clipkit.signatures import ends_early, signature

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | Mapping[str, Any]"

log = logging.getLogger("clipkit")

# .heic and .heif are listed although they are not read: a photo that is refused aloud is better than one passed over.
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"}


class _Limits(NamedTuple):
    pixels: int
    bytes: int
    side: int
    aspect: float


class _Refused(Exception):
    """A `BadImage` in the making: `load_image` adds where it happened."""

    def __init__(self, code: str, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.fix = code, message, fix

    def at(self, source: object) -> BadImage:
        return BadImage(self.code, self.message, where=describe(source), fix=self.fix)


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = 128_000_000,
    max_bytes: int = 64 * 1024**2,
    min_side: int = 2,
    max_aspect: float = 50.0,
) -> Image.Image:
    """A new RGB image, upright, over white.

    EXIF orientation is applied (unreadable EXIF: left as it is, and logged), transparency of any kind is laid over
    white, 16-bit grey is divided by 256, CMYK, LAB and YCbCr are converted, and of several frames the first is taken.

    Args:
        source: a path; encoded bytes; a PIL image; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or float
            in [0, 1]; or ``{"bytes": ..., "path": ...}`` as `datasets` stores an undecoded image (bytes win).
        max_pixels: largest width x height, read from the header before anything is decoded.
        max_bytes: largest encoded size; guards against giant metadata.
        min_side: shortest side allowed, in pixels.
        max_aspect: largest ratio of the sides. Resizing the short side of a 20000 x 1 strip would take gigabytes.

    Raises:
        BadImage: for everything that goes wrong, with one of the codes at the top of this file.
    """
    try:
        return _load(source, _Limits(max_pixels, max_bytes, min_side, max_aspect))
    except _Refused as refused:
        raise refused.at(source) from refused.__cause__
    except MemoryError as error:
        raise BadImage("TOO_LARGE", "not enough memory to decode it", where=describe(source)) from error
    except Exception as error:  # decoders raise anything: SyntaxError, IndexError, ValueError, struct.error ...
        raise BadImage("CORRUPT", f"{type(error).__name__}: {error}", where=describe(source)) from error


def probe_image(path: str | os.PathLike[str], *, max_bytes: int = 64 * 1024**2, guess: bool = True) -> None:
    """Whether a file is likely to load: it is there, can be read, is not empty or too large, and begins as an image.

    Nothing is decoded: 100,000 files take a few seconds.

    Args:
        path: the file.
        max_bytes: largest size allowed.
        guess: whether to look for the near name of a missing file, which lists its folder.

    Raises:
        BadImage: as `load_image`.
    """
    try:
        if not (head := _read(path, max_bytes, length=512, guess=guess)):
            raise _no_bytes()
        _kind(head)
    except _Refused as refused:
        raise refused.at(path) from refused.__cause__


def bytes_of(source: ImageSource, *, max_bytes: int = 64 * 1024**2) -> bytes:
    """The content of an image as bytes that can be hashed: the file's own, or size and pixels of what has no file.

    Raises:
        BadImage: as `load_image`; encoded bytes are not decoded here.
    """
    try:
        inner = _unwrap(source)
        if isinstance(inner, (str, os.PathLike)):
            return _read(inner, max_bytes)
        if isinstance(inner, (bytes, bytearray, memoryview)):
            return bytes(inner)
    except _Refused as refused:
        raise refused.at(source) from refused.__cause__
    image = load_image(inner)
    return b"pixels %d %d\n" % image.size + image.tobytes()


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether the suffix, in either case, is that of an image."""
    stem, _, suffix = os.fspath(path).rpartition(".")
    return f".{suffix.lower()}" in SUFFIXES and stem[-1:] not in ("", "/", os.sep)


def find_images(tree: Tree) -> list[Path]:
    """The images among the files of a folder (`clipkit.paths.walk`), told by their suffix, sorted by name."""
    return [path for path in tree.files if is_image_name(path)]


def describe(source: object) -> str:
    """How a person would look for this image: its path, or what was passed."""
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, (str, os.PathLike)):
        return show(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source):,} bytes passed as an image"
    if isinstance(source, Image.Image):
        return show(name) if (name := getattr(source, "filename", "")) else f"PIL image {source.size} {source.mode}"
    if isinstance(source, np.ndarray):
        return f"array of shape {source.shape}, {source.dtype}"
    return f"an object of type {type(source).__name__}"


# ------------------------------------------------------------------------------------------------- what was passed


def _load(source: ImageSource, limits: _Limits) -> Image.Image:
    inner = _unwrap(source)
    if isinstance(inner, Image.Image):
        _check_size(inner.size, limits)
        _load_pixels(inner, b"")
        return _to_rgb(inner, source)
    if isinstance(inner, np.ndarray):
        return _from_array(inner, limits)
    if isinstance(inner, (str, os.PathLike)):
        inner = _read(inner, limits.bytes)
    elif not isinstance(inner, (bytes, bytearray, memoryview)):
        raise _Refused("NOT_IMAGE", f"expected a path, bytes, PIL image or array; found {type(inner).__name__}")
    return _decode(bytes(inner), limits, source)


def _unwrap(source: ImageSource) -> Any:
    if isinstance(source, Mapping):
        data = source.get("bytes")
        source = data if data is not None else source.get("path")  # type: ignore[assignment]
    if source is None:
        raise _Refused("EMPTY", "there is no image here: neither bytes nor a path", "give the row an image or drop it")
    return source


def _read(path: str | os.PathLike[str], max_bytes: int, *, length: int = -1, guess: bool = True) -> bytes:
    name = os.fspath(path)
    if is_url(name):
        raise _Refused("URL", "clipkit does not download images", "download it first and give the file's path")
    try:
        # A FIFO or device must never be waited for: look before opening, and open without blocking.
        _regular(os.stat(name).st_mode)  # noqa: PTH116 (a Path costs as much as the call)
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            if size > max_bytes:
                raise _Refused("TOO_LARGE", f"the file has {size:,} bytes; at most {max_bytes:,} are read", _RAISE)
            return file.read(length)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _Refused("MISSING", "no such file", did_you_mean(Path(name)) if guess else None) from error
    except PermissionError as error:
        raise _Refused("UNREADABLE", "no permission to read it", "check the owner and mode of the file") from error
    except ValueError as error:  # a NUL in the name
        raise _Refused("MISSING", f"not a file name: {error}") from error
    except OSError as error:
        raise _Refused("UNREADABLE", f"the system could not read it: {error.strerror}") from error


_RAISE = "shrink the image, or raise the limit where you call load_image"


def _regular(mode: int) -> None:
    for is_kind, name in ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket")):
        if is_kind(mode):
            raise _Refused("NOT_REGULAR", f"expected a file; this is a {name}")
    if not stat.S_ISREG(mode):
        raise _Refused("NOT_REGULAR", "expected a file; this is a device")


def _from_array(array: np.ndarray[Any, Any], limits: _Limits) -> Image.Image:
    shape = array.shape
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        hint = "channels come last: array.transpose(1, 2, 0)" if array.ndim == 3 and shape[0] in (1, 3, 4) else None
        raise _Refused("FORMAT", f"expected shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); found {shape}", hint)
    _check_size((shape[1], shape[0]), limits)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0.0 and high <= 1.0):  # NaN fails both
            raise _Refused("FORMAT", f"float arrays must lie in [0, 1]; found {low:g} to {high:g}", "scale it first")
        array = np.rint(array * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        raise _Refused("FORMAT", f"expected uint8, or float in [0, 1]; found {array.dtype}", "convert it first")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array[..., 0] if shape[2:] == (1,) else array)), array)


# ---------------------------------------------------------------------------------------------------------- decoding


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Not wanted here, and on broken EXIF it warns."""


_DECODERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": _Jpeg,  # also for MPO: its first frame is a plain JPEG
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


def _decode(data: bytes, limits: _Limits, source: object) -> Image.Image:
    if not data:
        raise _no_bytes()
    if len(data) > limits.bytes:
        raise _Refused("TOO_LARGE", f"{len(data):,} bytes; at most {limits.bytes:,} are read", _RAISE)
    kind = _kind(data)
    noisy = kind in ("GIF", "TIFF", "AVIF") or (kind == "PNG" and b"acTL" in data[:256])
    with _quiet() if noisy else nullcontext():
        try:
            image = _DECODERS[kind](io.BytesIO(data))
        except Exception as error:
            raise _broken(error, data, kind) from error
        _check_size(image.size, limits)
        _load_pixels(image, data, kind)
        return _to_rgb(image, source)


def _no_bytes() -> _Refused:
    return _Refused("EMPTY", "there are no bytes", "copy or download it again")


def _kind(data: bytes) -> str:
    found = signature(data)
    if found.code:
        raise _Refused(found.code, found.name, found.fix)
    return found.name


def _load_pixels(image: Image.Image, data: bytes, kind: str = "") -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _broken(error, data, kind) from error


def _broken(error: Exception, data: bytes, kind: str) -> _Refused:
    if isinstance(error, Image.DecompressionBombError):
        return _Refused("TOO_LARGE", str(error), _RAISE)
    again = "copy or download it again"
    if "truncated" in str(error).lower() or ends_early(data, kind):
        return _Refused("TRUNCATED", f"the {kind or 'image'} ends before the image does ({len(data):,} bytes)", again)
    return _Refused("CORRUPT", f"the {kind or 'image'} decoder refused it: {error or type(error).__name__}", again)


def _check_size(size: tuple[int, int], limits: _Limits) -> None:
    width, height = size
    if width * height > limits.pixels:
        found = f"{width} x {height} = {width * height:,} pixels"
        raise _Refused("TOO_LARGE", f"{found}; at most {limits.pixels:,} are decoded", _RAISE)
    if min(size) < max(limits.side, 1):
        raise _Refused("TOO_SMALL", f"{width} x {height} pixels; each side needs at least {max(limits.side, 1)}")
    if max(size) > limits.aspect * min(size):
        found = f"{width} x {height} pixels is {max(size) / min(size):.1f}:1"
        raise _Refused("ASPECT", f"{found}; at most {limits.aspect:g}:1 is resized", "crop it first")


_warnings_lock = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's own warnings off. The filters belong to the process, so one thread at a time, and rare formats only."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ----------------------------------------------------------------------------------------------------------- to RGB


def _to_rgb(image: Image.Image, source: object) -> Image.Image:
    orientation = _orientation(image, source)
    if image.mode.startswith("I"):
        image = _from_sixteen_bits(image)
    elif image.mode == "F":
        raise _Refused("FORMAT", "float pixels have no known range", "scale it to 8 bits first")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
    else:
        rgb = image.convert("RGB")
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {}  # megabytes of metadata need not travel between processes; nor may EXIF be applied twice
    return rgb


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise _Refused("FORMAT", "32-bit pixels beyond 0..65535 have no known range", "scale it to 8 bits first")
    grey = (values >> 8).astype(np.uint8)
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey)


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image, source: object) -> int:
    """EXIF tag 0x0112 of the first directory (EXIF 2.3, 4.6.4), 1 where there is none.

    Read by hand: Pillow's reader warns and raises on damage in tags that do not matter here.
    """
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    try:
        while exif.startswith(b"Exif\0\0"):
            exif = exif[6:]
        order = {b"II*\0": "<", b"MM\0*": ">"}[exif[:4]]
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == 0x0112:
                return int(struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], exif, entry + 8)[0])
    except (KeyError, struct.error):
        log.warning("WARN_EXIF: unreadable EXIF, the image is used as it is stored: %s", describe(source))
    return 1
