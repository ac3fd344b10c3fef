"""Glyphs as images: every character of matplotlib's text faces, black on white."""

from __future__ import annotations

import io
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from clipkit.errors import ResourceError

SIDE = 32  # pixels
# pixels; all characters share them, so that c and C, comma and apostrophe differ
EM = 27
BASELINE = 25
MARGIN = 32  # for ink outside the em box (combining marks, wide signs), before it is centred

FACES = {
    "DejaVuSans": "sans",
    "DejaVuSans-Bold": "bold sans",
    "DejaVuSans-Oblique": "oblique sans",
    "DejaVuSans-BoldOblique": "bold oblique sans",
    "DejaVuSansMono": "mono",
    "DejaVuSansMono-Bold": "bold mono",
    "DejaVuSansMono-Oblique": "oblique mono",
    "DejaVuSansMono-BoldOblique": "bold oblique mono",
    "DejaVuSerif": "serif",
    "DejaVuSerif-Bold": "bold serif",
    "DejaVuSerif-Italic": "italic serif",
    "DejaVuSerif-BoldItalic": "bold italic serif",
    "STIXGeneral": "stix",
    "STIXGeneralBol": "bold stix",
    "STIXGeneralItalic": "italic stix",
    "STIXGeneralBolIta": "bold italic stix",
}


@dataclass(frozen=True)
class Glyph:
    """One character in one face."""

    char: str
    face: str
    png: bytes

    @property
    def name(self) -> str:
        return unicodedata.name(self.char).lower()

    def captions(self, draw: random.Random) -> list[str]:
        """Return three captions: the name with the face, the name, and half of its words, drawn at random.

        Half a name ("cyrillic letter", "small with acute") teaches what a single word means; without it a prompt that
        names an idea differs from every caption. Each face draws its own half, so that a character appears under many.
        """
        words = self.name.split()
        some_words = [word for word in words if draw.random() < 0.5] or words[:1]
        return [f"{self.face}: {self.name}", self.name, " ".join(some_words)]


def draw_all() -> list[Glyph]:
    """Draw every character in every face; this takes some five seconds."""
    drawn: list[Glyph] = []
    for font, face in FACES.items():
        drawn += draw_face(_font_file(font), face)
    return drawn


def draw_face(file: Path, face: str) -> Iterator[Glyph]:
    """Draw every named character of a font that leaves ink, in the order of code points."""
    from matplotlib.ft2font import FT2Font

    sizes = [ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC) for size in range(EM, 3, -1)]
    drawable = FT2Font(str(file)).get_charmap()  # code point -> index in the font; 0 is the box for "no such character"
    for code in sorted(drawable):
        char = chr(code)
        if not drawable[code] or not unicodedata.name(char, ""):
            continue
        image = draw(char, sizes)
        if image is not None:
            yield Glyph(char, face, _png(image))


def draw(char: str, sizes: Sequence[ImageFont.FreeTypeFont]) -> Image.Image | None:
    """Draw a character in black on white, its ink centred horizontally; None if it leaves no ink.

    The first of `sizes` (largest first) whose ink fits the image is used. Ink that would cross the upper or lower edge
    is moved inside; all other ink is on the common baseline.
    """
    for font in sizes:
        ink = Image.new("L", (SIDE + 2 * MARGIN, SIDE + 2 * MARGIN))
        ImageDraw.Draw(ink).text((MARGIN, MARGIN + BASELINE), char, fill=255, font=font, anchor="ls")
        box = ink.getbbox()
        if box is None:
            return None
        left, top, right, bottom = box
        inside = min(box) > 0 and max(box) < SIDE + 2 * MARGIN
        if inside and max(right - left, bottom - top) <= SIDE:
            image = Image.new("L", (SIDE, SIDE))
            y = min(max(top - MARGIN, 0), SIDE - (bottom - top))
            image.paste(ink.crop(box), ((SIDE - (right - left)) // 2, y))
            return ImageChops.invert(image)
    return None


def _font_file(name: str) -> Path:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not file.is_file():
        raise ResourceError(
            "expected the fonts that come with matplotlib, found none", where=file, fix="reinstall matplotlib with pip"
        )
    return file


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
