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
user's process.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageChops

from clipkit.errors import BadImage
from clipkit.extras import install_command, missing_packages
from clipkit.images import depth
from clipkit.images.containers import WITHOUT_METADATA, bare_png
from clipkit.images.decoders import opened, wide_netpbm
from clipkit.images.orientation import BadExif, exif_orientation, upright, xmp_orientation
from clipkit.images.signatures import ends_early, signature
from clipkit.paths import Tree, did_you_mean, is_url, show

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | Mapping[str, Any]"
log = logging.getLogger("clipkit")
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".hif"}


class _Limits(NamedTuple):
    pixels: int
    bytes: int
    side: int
    aspect: float
    at_least: int | None


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
    at_least: int | None = None,
) -> Image.Image:
    """A new RGB image, upright, over white.

    Orientation is applied as EXIF has it, else XMP (unreadable EXIF is logged), transparency of any kind is laid over
    white, more than 8 bits a sample are brought down to 8 by the range that the file declares or else by its values
    (logged), CMYK, LAB and YCbCr are converted, and of several frames the first is taken. What is guessed is logged
    for the first image of its kind, under a word that begins with WARN_.

    Args:
        source: a path; encoded bytes; a PIL image; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or float
            in [0, 1]; or ``{"bytes": ..., "path": ...}`` as `datasets` stores an undecoded image (bytes win).
        max_pixels: largest width x height, read from the header before anything is decoded.
        max_bytes: largest encoded size; guards against giant metadata.
        min_side: shortest side allowed, in pixels.
        max_aspect: largest ratio of the sides. Resizing the short side of a 20000 x 1 strip would take gigabytes.
        at_least: let the decoder of a JPEG scale it by 1/2, 1/4 or 1/8, which takes a fraction of the time, as long as
            neither side falls below so many pixels; None decodes all pixels. With three times the model's input the
            embeddings' cosine to those of all pixels is 0.999 and more. Limits are those of the full size.

    Raises:
        BadImage: for everything that goes wrong, with one of the codes at the top of this file.
    """
    try:
        return _load(source, _Limits(max_pixels, max_bytes, min_side, max_aspect, at_least))
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


def _load(source: ImageSource, limits: _Limits) -> Image.Image:
    inner = _unwrap(source)
    if isinstance(inner, Image.Image):
        _check_size(inner.size, limits)
        rawmode = depth.rawmode_of(inner)
        _load_pixels(inner, b"")
        if depth.is_dark(inner, rawmode):
            _warn("WARN_DEPTH", "16-bit samples hold small values, of which Pillow drops half: pass the file", source)
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


def _decode(data: bytes, limits: _Limits, source: object) -> Image.Image:
    if not data:
        raise _no_bytes()
    if len(data) > limits.bytes:
        raise _Refused("TOO_LARGE", f"{len(data):,} bytes; at most {limits.bytes:,} are read", _RAISE)
    kind = _kind(data)
    with _quiet() if kind in ("GIF", "TIFF", "AVIF", "HEIF") else nullcontext():
        try:
            return _decoded(data, kind, limits, source)
        except _Refused as refused:
            spare = WITHOUT_METADATA.get(kind)
            if refused.code != "CORRUPT" or spare is None or (bare := spare(data)) == data:
                raise
        return _decoded(bare, kind, limits, source)


def _decoded(data: bytes, kind: str, limits: _Limits, source: object) -> Image.Image:
    whole = data
    data, info = bare_png(data) if kind == "PNG" else (data, {})
    try:
        image = opened(kind, data)
    except Exception as error:
        raise _broken(error, whole, kind) from error
    _check_size(image.size, limits)
    if kind == "JPEG" and limits.at_least is not None:
        image.draft(image.mode, (limits.at_least, limits.at_least))
    if kind == "PPM" and (samples := wide_netpbm(image, data)):
        return _told(depth.netpbm(*samples), source).convert("RGB")
    rawmode = depth.rawmode_of(image)
    _load_pixels(image, whole, kind)
    image.info |= info
    if depth.is_dark(image, rawmode):
        image = _lightened(image, rawmode, lambda: opened(kind, data), source)
    return _to_rgb(image, source)


def _no_bytes() -> _Refused:
    return _Refused("EMPTY", "there are no bytes", "copy or download it again")


def _kind(data: bytes) -> str:
    kind = signature(data)
    if kind.code:
        raise _Refused(kind.code, kind.name, kind.fix)
    if kind.name == "HEIF" and _no_heif():
        raise _Refused("FORMAT", "a HEIC photo needs the package pillow-heif", install_command("heic"))
    return kind.name


@cache
def _no_heif() -> bool:
    return bool(missing_packages("pillow_heif"))


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
    if "unknown pixel mode" in str(error):
        return _Refused("FORMAT", f"a {kind} of a kind that is not read", "convert it to JPEG or PNG")
    return _Refused("CORRUPT", f"the {kind or 'image'} decoder refused it: {error or type(error).__name__}", again)


def _check_size(size: tuple[int, int], limits: _Limits) -> None:
    width, height = size
    if width * height > limits.pixels:
        shown = f"{width} x {height} = {width * height:,} pixels"
        raise _Refused("TOO_LARGE", f"{shown}; at most {limits.pixels:,} are decoded", _RAISE)
    if min(size) < max(limits.side, 1):
        raise _Refused("TOO_SMALL", f"{width} x {height} pixels; each side needs at least {max(limits.side, 1)}")
    if max(size) > limits.aspect * min(size):
        shown = f"{width} x {height} pixels is {max(size) / min(size):.1f}:1"
        raise _Refused("ASPECT", f"{shown}; at most {limits.aspect:g}:1 is resized", "crop it first")


_warnings_lock = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's own warnings off. The filters belong to the process, so one thread at a time, and rare formats only."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _lightened(image: Image.Image, rawmode: str, again: Callable[[], Image.Image], source: object) -> Image.Image:
    try:
        lightened = depth.lightened(image, rawmode, again)
    except depth.UnknownRange as error:
        raise _Refused("FORMAT", str(error), "scale it to 8 bits first") from error
    lightened.image.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return _told(lightened, source)


def _to_rgb(image: Image.Image, source: object) -> Image.Image:
    orientation = _orientation(image, source)
    if image.mode.startswith("I") or image.mode == "F":
        try:
            image = _told(depth.grey(image), source)
        except depth.UnknownRange as error:
            raise _Refused("FORMAT", str(error), "scale it to 8 bits first") from error
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode in ("P", "PA") and image.palette is None:
        raise _Refused("CORRUPT", "an image of palette colours without the palette", "copy or download it again")
    elif image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Adobe writes inks inverted, and Pillow takes every JPEG for Adobe's; libvips, GIMP and ImageMagick do not
        _warn("WARN_CMYK", "a CMYK JPEG without Adobe's mark: its inks are taken as they stand", source)
        image = ImageChops.invert(image)
    rgb = _over_white(image, source) if image.has_transparency_data else image.convert("RGB")
    rgb = upright(rgb, orientation)
    rgb.info = {}  # megabytes of metadata need not travel between processes; nor may EXIF be applied twice
    return rgb


def _over_white(image: Image.Image, source: object) -> Image.Image:
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (0, 0):
        colours = rgba.convert("RGB")
        if any(low != high for low, high in colours.getextrema()):  # type: ignore[misc]
            # some writers of BMP and TIFF leave the fourth byte at zero
            _warn("WARN_ALPHA", "every pixel is transparent: the colours beneath are taken", source)
            return colours
    rgb = Image.new("RGB", rgba.size, "white")
    rgb.paste(rgba, mask=alpha)
    return rgb


def _orientation(image: Image.Image, source: object) -> int:
    if image.format == "TIFF":
        return 1  # Pillow has turned it already
    exif = None
    try:
        exif = exif_orientation(image.info)
    except BadExif:
        log.warning("WARN_EXIF: unreadable EXIF, the image is used as it is stored: %s", describe(source))
    return exif if exif is not None else xmp_orientation(image.info) or 1


def _told(shades: depth.Shades, source: object) -> Image.Image:
    if shades.guess:
        _warn("WARN_DEPTH", shades.guess, source)
    return shades.image


_warned: set[str] = set()


def _warn(code: str, message: str, source: object) -> None:
    """Once in a process for each code: a folder of a hundred thousand such images has one line, with the first."""
    if code not in _warned:
        _warned.add(code)
        log.warning("%s: %s: %s (and perhaps others: this is said once)", code, message, describe(source))
