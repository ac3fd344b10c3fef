"""Every kind of pixels against the picture that was put in: what comes out is that picture, or a BadImage."""

from __future__ import annotations

import io
import logging
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from clipkit.errors import BadImage
from clipkit.images import load as images
from clipkit.images.load import load_image, probe_image

ROWS, COLUMNS = np.mgrid[0:48, 0:64]
DISC = (COLUMNS - 20) ** 2 + (ROWS - 30) ** 2 < 150
COLOUR = np.stack([COLUMNS * 4, ROWS * 5, np.where(DISC, 230, 30)], -1).astype(np.uint8)
GREY = np.asarray(Image.fromarray(COLOUR).convert("L"))
ALIKE = 9.0  # mean difference allowed where a format or mode loses something


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> Iterator[None]:
    images._warned.clear()
    yield
    images._warned.clear()


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(samples: np.ndarray, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG of (H, W, 1 to 4) uint8 or uint16 samples, with chunks before and after its IDAT."""
    height, width, bands = samples.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    header = struct.pack(">IIBBBBB", width, height, samples.dtype.itemsize * 8, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(samples.dtype.newbyteorder(">")).tobytes() for row in samples)
    body = chunk(b"IHDR", header) + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + after
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def tiff(
    samples: np.ndarray, photometric: int, order: str = "<", planar: int = 1, **tags: tuple[str, Sequence[Any]]
) -> bytes:
    """An uncompressed TIFF 6.0 of (H, W, C) samples; tags as ``t340=("H", [0])``."""
    height, width, bands = samples.shape
    body = (samples.transpose(2, 0, 1) if planar == 2 else samples).astype(samples.dtype.newbyteorder(order)).tobytes()
    strips = bands if planar == 2 else 1
    part = len(body) // strips
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries: dict[int, tuple[str, Sequence[Any]]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [samples.dtype.itemsize * 8] * bands), 259: ("H", [1]),
        262: ("H", [photometric]), 273: ("I", [8 + part * i for i in range(strips)]), 277: ("H", [bands]),
        278: ("I", [height]), 279: ("I", [part] * strips), 284: ("H", [planar]), 339: ("H", [kind] * bands),
    }  # fmt: skip
    entries |= {int(name[1:]): value for name, value in tags.items()}
    start = 8 + len(body)
    directory, beyond = struct.pack(order + "H", len(entries)), b""
    for tag, (letter, values) in sorted(entries.items()):
        packed = struct.pack(order + letter * len(values), *values)
        if len(packed) > 4:
            place = start + 2 + 12 * len(entries) + 4 + len(beyond)
            beyond, packed = beyond + packed, struct.pack(order + "I", place)
        number = {"B": 1, "H": 3, "I": 4, "f": 11}[letter]
        directory += struct.pack(order + "HHI", tag, number, len(values)) + packed.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + body + directory + b"\0\0\0\0" + beyond


def off(source: Any, want: np.ndarray) -> float:
    """Mean difference from a (H, W) or (H, W, 3) picture."""
    got = np.asarray(load_image(source)).astype(float)
    return float(np.abs(got - (want if want.ndim == 3 else want[..., None])).mean())


# ------------------------------------------------------------------------------------------------ all modes and formats


def in_mode(mode: str) -> Image.Image:
    colour, grey = Image.fromarray(COLOUR), GREY.astype(np.float64)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(colour, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    if mode in ("LA", "La"):
        return Image.fromarray(GREY).convert("LA").convert(mode)
    if mode == "RGBa":
        return colour.convert("RGBA").convert(mode)
    if mode in ("P", "PA"):
        return colour.quantize(128).convert(mode)
    if mode.startswith("I;16"):
        letter = ">" if mode.endswith("B") else "<"
        return Image.frombytes(mode, colour.size, (GREY.astype(np.uint16) * 257).astype(f"{letter}u2").tobytes())
    if mode == "1":
        return Image.fromarray((GREY > 127).astype(np.uint8) * 255).convert("1")
    if mode in ("I", "F"):
        return Image.fromarray(
            (grey * (257 if mode == "I" else 1 / 255)).astype(np.int32 if mode == "I" else np.float32)
        )
    return Image.fromarray(GREY) if mode == "L" else colour.convert(mode)


EVERY_MODE = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
EVERY_MODE += ["I;16", "I;16L", "I;16B", "I;16N"]
READ = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"}
CLIPS = {"GIF", "WEBP", "AVIF"}  # Pillow's writers cut 16 bits off at 255: the file itself is white


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Pillow's PNG writer on mode I
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_every_mode_in_every_format(mode: str) -> None:
    image = in_mode(mode)
    want = (GREY > 127) * 255 if mode == "1" else GREY if mode[0] in "LI" and mode != "LAB" else COLOUR
    if mode == "F":
        with pytest.raises(BadImage, match="no known range"):
            load_image(image)
    else:
        assert off(image, want) < ALIKE
    Image.init()
    written = set()
    for kind in sorted(Image.SAVE):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError):
            data = encode(image, kind)
            written.add(kind)
            if kind not in READ:
                with pytest.raises(BadImage):
                    load_image(data)
            elif mode == "F" and kind not in CLIPS:
                with pytest.raises(BadImage, match="FORMAT"):
                    load_image(data)
            elif mode[0] not in "IF" or kind not in CLIPS:
                assert off(data, want) < ALIKE, kind
    assert written & READ or mode == "La"


# -------------------------------------------------------------------------------------------- more than 8 bits a sample


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_range_of_the_values_counts_where_none_is_declared(bits: int, caplog: pytest.LogCaptureFixture) -> None:
    scale = (2**bits - 1) / 255
    grey, colour = (np.rint(values * scale).astype(np.uint16) for values in (GREY[..., None], COLOUR))
    opaque = np.full_like(grey, 65535)
    files = {
        "array": Image.fromarray(grey[..., 0]),
        "I": Image.fromarray(grey[..., 0].astype(np.int32)),
        "PNG grey": png(grey),
        "PNG grey + alpha": png(np.concatenate([grey, opaque], -1)),
        "PGM": b"P5 64 48 65535\n" + grey.astype(">u2").tobytes(),
        "PPM": b"P6 64 48 65535\n" + colour.astype(">u2").tobytes(),
        "PNG colour": png(colour),
        "PNG colour + alpha": png(np.concatenate([colour, opaque], -1)),
        "TIFF lzw": encode(Image.fromarray(grey[..., 0]), "TIFF", compression="tiff_lzw"),
    }
    for order in "<>":
        files[f"TIFF grey {order}"] = tiff(grey, 1, order)
        for planar in (1, 2):
            files[f"TIFF colour {order} {planar}"] = tiff(colour, 2, order, planar)
    for name, source in files.items():
        images._warned.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="clipkit"):
            assert off(source, COLOUR if "colour" in name or "PPM" in name else GREY) < 1, name
        assert ("WARN_DEPTH" in caplog.text) == (bits < 16), name
        assert (f"read as {bits}-bit values" in caplog.text) == (bits < 16), name


def test_it_is_said_once_not_for_every_image(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="clipkit"):
        for _ in range(3):
            load_image(png(GREY[..., None].astype(np.uint16) * 16))
    assert caplog.text.count("WARN_DEPTH") == 1


def test_alpha_of_sixteen_bits_keeps_a_range_of_its_own() -> None:
    alpha = np.where(ROWS < 24, 0, 4095)[..., None]
    half = np.concatenate([COLOUR.astype(np.uint16) * 16, alpha], -1).astype(np.uint16)
    want = np.where(ROWS[..., None] < 24, 255, COLOUR)
    assert off(png(half), want) < 1
    key = np.array([160, 320, 480], np.uint16)
    keyed = np.where(DISC[..., None], key, 2000).astype(np.uint16)
    got = np.asarray(load_image(png(keyed, chunk(b"tRNS", key.astype(">u2").tobytes()))))
    assert (got[DISC] == 255).all()
    assert (got[~DISC] == 2000 // 16).all()  # 11 bits are read as 12: 2000 / 16


@pytest.mark.parametrize("order", ["<", ">"])
def test_white_is_zero(order: str) -> None:
    for scale in (1, 16, 257):
        values = GREY.astype(np.uint16) * scale
        most = {1: 255, 16: 4095, 257: 65535}[scale]
        with suppress(BadImage):  # Pillow does not know it in big-endian order
            assert off(tiff((most - values)[..., None], 0, order), GREY) < 1
            assert order == "<"
    assert off(tiff(255 - GREY[..., None], 0, order), GREY) < 1
    assert off(tiff((255 - GREY[..., None]).astype(np.uint16), 0, t341=("H", [255])), GREY) < 1


def test_the_declared_range_comes_first(caplog: pytest.LogCaptureFixture) -> None:
    dim = (GREY[..., None] // 16).astype(np.uint16)  # a twelve-bit picture of the night: up to 15 of 4,095 ... times 16
    night = dim * 16
    sbit = chunk(b"sBIT", b"\x0c")
    real = (GREY[..., None] / 255).astype(np.float32)
    cases = {
        "TIFF SMaxSampleValue": (tiff(night, 1, t341=("H", [4095])), night / 16),
        "TIFF MaxSampleValue": (tiff(night, 1, t281=("H", [3000])), night * 255 / 3000),
        "TIFF SMin and SMax": (tiff(night, 1, t340=("H", [0]), t341=("H", [510])), night / 2),
        "TIFF float": (tiff(real, 1, t340=("f", [0.0]), t341=("f", [1.0])), GREY[..., None]),
        "TIFF float, negative": (tiff(real - 1, 1, t340=("f", [-1.0]), t341=("f", [0.0])), GREY[..., None]),
        "TIFF 32 bits": (tiff(night.astype(np.int32) * 65536, 1, t341=("I", [4095 * 65536])), night / 16),
        "PNG sBIT, not shifted": (png(night + 1, sbit), night / 16),
        "PNG sBIT, shifted": (png(night * 16, sbit), night / 16),
        "PNG sBIT, all": (png(night, chunk(b"sBIT", b"\x10")), night / 256),
        "PGM maxval": (b"P5 64 48 4095\n" + night.astype(">u2").tobytes(), night / 16),
        "PGM maxval 1000": (b"P5 64 48 1000\n" + night.astype(">u2").tobytes(), night * 0.255),
    }
    with caplog.at_level(logging.WARNING, logger="clipkit"):
        for name, (source, want) in cases.items():
            assert off(source, np.repeat(want, 3, -1)) <= 1, name
    assert "WARN_DEPTH" not in caplog.text
    with pytest.raises(BadImage, match="float pixels have no known range"):
        load_image(tiff(real, 1, t341=("f", [0.5])))  # what is declared is not true
    assert off(tiff(night, 1, t341=("H", [100])), np.repeat(night, 3, -1)) < 1  # nor here: by the values


def test_twelve_bits_packed() -> None:
    values = (GREY.astype(np.uint16) * 16).ravel()
    first, second = values[::2], values[1::2]  # two samples in three bytes, high bits first
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    data = tiff(packed.reshape(48, 96, 1), 1, t256=("I", [64]), t258=("H", [12]))
    assert off(data, GREY) < 1


# ---------------------------------------------------------------------- what Pillow gives as noise, black or a negative


def test_tiffs_that_pillow_misreads() -> None:
    ycbcr = np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))
    assert off(tiff(ycbcr, 6), COLOUR) < 2
    with pytest.raises(BadImage, match="FORMAT"):
        load_image(tiff(ycbcr[:24], 6, t257=("I", [48]), t278=("I", [48])))  # half the bytes: subsampled
    palette = Image.fromarray(COLOUR).quantize(200)
    colours = np.array(palette.getpalette("RGB"), np.uint16).reshape(-1, 3)
    colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
    for scale in (1, 257):  # eight bits where sixteen belong; and right
        data = tiff(np.asarray(palette)[..., None], 3, t320=("H", (colours.T * scale).ravel().tolist()))
        assert off(data, COLOUR) < ALIKE
    empty = np.zeros((48, 64, 1), np.uint8)
    for kind, data in (("TIFF", tiff(np.concatenate([COLOUR, empty], -1), 2)), ("BMP", _bmp_of_alpha_zero())):
        assert off(data, COLOUR) < 1, kind


def _bmp_of_alpha_zero() -> bytes:
    pixels = np.concatenate([COLOUR[::-1, :, ::-1], np.zeros((48, 64, 1), np.uint8)], -1).tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 64, 48, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels


def test_a_palette_that_is_not_there() -> None:
    data = encode(Image.fromarray(COLOUR).quantize(16))
    start = data.index(b"PLTE") - 4
    length = int.from_bytes(data[start : start + 4])
    with pytest.raises(BadImage, match="without the palette"):
        load_image(data[:start] + data[start + 12 + length :])


def test_cmyk_jpeg_with_and_without_adobes_mark(caplog: pytest.LogCaptureFixture) -> None:
    data = encode(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=95)
    assert off(data, COLOUR) < ALIKE
    place = data.index(b"\xff\xee")
    inverted = np.asarray(Image.fromarray(COLOUR).convert("CMYK")) ^ 255  # what stands in a file that is not Adobe's
    plain = encode(Image.frombytes("CMYK", (64, 48), inverted.tobytes()), "JPEG", quality=95)
    with caplog.at_level(logging.WARNING, logger="clipkit"):
        assert off(plain[:place] + plain[place + 16 :], COLOUR) < ALIKE
    assert "WARN_CMYK" in caplog.text


# ---------------------------------------------------------------------------------------------------------- orientation

XMP = (
    b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>"
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" %s</rdf:RDF></x:xmpmeta>'
)
ATTRIBUTE, ELEMENT = b'tiff:Orientation="%d"/>', b"><tiff:Orientation>%d</tiff:Orientation></rdf:Description>"


def raw_profile(exif: bytes) -> bytes:
    """As ImageMagick writes it."""
    lines = exif.hex()
    return b"\nexif\n%8d\n" % len(exif) + "\n".join(lines[i : i + 72] for i in range(0, len(lines), 72)).encode()


def oriented(kind: str, number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    block, pixels = exif.tobytes(), COLOUR
    text = raw_profile(block)
    if kind == "PNG eXIf after the pixels":
        return png(pixels, after=chunk(b"eXIf", block[6:]))
    if kind == "PNG raw profile":
        return png(pixels, chunk(b"tEXt", b"Raw profile type exif\0" + text))
    if kind == "PNG packed raw profile":
        return png(pixels, after=chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))
    packet = XMP % ((ELEMENT if number % 2 else ATTRIBUTE) % number)
    if kind == "PNG XMP":
        return png(pixels, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet))
    if kind == "PNG packed XMP":
        return png(pixels, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(packet)))
    if kind == "JPEG EXIF 1 and XMP":
        exif[0x0112] = 1
        return encode(pixels, "JPEG", xmp=packet, exif=exif.tobytes())
    if kind == "TIFF XMP":
        return tiff(pixels, 2, t700=("B", packet))
    return encode(pixels, kind.split()[0], xmp=packet)


@pytest.mark.parametrize("kind", [
    "PNG eXIf after the pixels", "PNG raw profile", "PNG packed raw profile", "PNG XMP", "PNG packed XMP", "JPEG XMP",
    "JPEG EXIF 1 and XMP", "WEBP XMP", "AVIF XMP", "TIFF XMP",
])  # fmt: skip
def test_orientation_as_pillow_gives_it(kind: str) -> None:
    for number in range(1, 9):
        data = oriented(kind, number)
        want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert want.shape == ((48, 64, 3) if number < 5 or "EXIF 1" in kind else (64, 48, 3))
        np.testing.assert_array_equal(np.asarray(load_image(data)), want, str(number))
        np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), want, str(number))


def test_a_damaged_raw_profile_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="clipkit"):
        assert off(png(COLOUR, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz")), COLOUR) == 0
    assert "WARN_EXIF" in caplog.text


# ------------------------------------------------------------------------------------------------------------- metadata


def test_metadata_never_costs_a_png() -> None:
    packed = zlib.compress(bytes(3 * 2**20))
    text = chunk(b"zTXt", b"comment\0\0" + packed)
    cases = {
        "large text": [text],
        "many texts": [text] * 40,
        "large profile": [chunk(b"iCCP", b"icc\0\0" + packed)],
        "unknown packing": [chunk(b"zTXt", b"a\0\7bc"), chunk(b"iCCP", b"icc\0\7bc")],
        "short chunks": [chunk(name, b"") for name in (b"sRGB", b"pHYs", b"gAMA", b"iCCP", b"sBIT", b"acTL", b"fcTL")],
        "wrong checksum": [text[:-4] + b"abcd"],
        "large EXIF text": [chunk(b"zTXt", b"Raw profile type exif\0\0" + packed)],
        "large XMP": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed)],
        "broken texts": [chunk(b"iTXt", b"XML:com.adobe.xmp\0"), chunk(b"zTXt", b"Raw profile type exif\0")],
    }
    for name, chunks in cases.items():
        assert off(png(COLOUR, *chunks), COLOUR) == 0, name
        assert off(png(COLOUR, after=b"".join(chunks)), COLOUR) == 0, name


def test_a_bomb_of_text_costs_neither_time_nor_memory() -> None:
    packed = zlib.compress(bytes(200 * 2**20), 9)
    data = png(COLOUR, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed), chunk(b"zTXt", b"a\0\0" + packed))
    tracemalloc.start()
    start = time.process_time()
    assert off(data, COLOUR) == 0
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()
    assert time.process_time() - start < 5


def test_metadata_never_costs_a_jpeg_or_avif() -> None:
    data = encode(COLOUR, "JPEG", quality=95)
    segments = {
        0xE0: b"JFIF",
        0xE1: b"Exif\0\0xx",
        0xE2: b"ICC_PROFILE\0",
        0xED: b"Photoshop 3.0\x008BIM\3\xed",
        0xEE: b"Adobe",
    }
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = encode(COLOUR, "JPEG", quality=95, exif=exif.tobytes())
    for marker, body in segments.items():
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
        assert off(data[:2] + segment + data[2:], COLOUR) < ALIKE, body
        if marker != 0xE1:
            assert off(turned[:2] + b"\xff" + segment + turned[2:], COLOUR[::-1, ::-1]) < ALIKE, body
    exif[0x010F] = "marker"
    avif = encode(COLOUR, "AVIF", exif=exif.tobytes())
    place = avif.rindex(b"MM\0*", 0, avif.index(b"marker"))
    assert off(avif[:place] + b"XX" + avif[place + 2 :], COLOUR[::-1, ::-1]) < ALIKE  # AVIF turns by itself


# ----------------------------------------------------------------------------------------------------------------- HEIC


def heic(number: int = 1, **options: Any) -> bytes:
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    image = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = number
    buffer = io.BytesIO()
    heif.from_pillow(image).save(buffer, quality=90, exif=exif.tobytes(), **options)
    return buffer.getvalue()


@pytest.mark.parametrize("number", [1, 3, 6, 8])
def test_heic_comes_upright(number: int) -> None:
    data = heic(number)
    want = np.asarray(images.upright(Image.fromarray(COLOUR), number))
    assert load_image(data).size == want.shape[1::-1]
    assert off(data, want) < ALIKE
    assert "HEIF" not in Image.OPEN  # the user's process is left alone


def test_heic_is_held_to_the_same_limits() -> None:
    data = heic()
    for source, options, code in (
        (data, {"max_pixels": 3000}, "TOO_LARGE"),
        (data, {"max_bytes": 100}, "TOO_LARGE"),
        (data[: len(data) // 2], {}, None),
        (data[:64], {}, None),
    ):
        with pytest.raises(BadImage) as caught:
            load_image(source, **options)
        assert caught.value.code in ((code,) if code else ("CORRUPT", "TRUNCATED"))


def test_without_the_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(images, "_no_heif", lambda: True)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for call in (load_image, probe_image):
        with pytest.raises(BadImage, match=r"needs the package pillow-heif[\s\S]*pip install .*\[heic\]") as caught:
            call(tmp_path / "a.heic")
        assert caught.value.code == "FORMAT"
