"""HTML reports of one file each: no server, no script, no links."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

BLUE = "#2f6fde"
GREY = "#9aa3af"
COLOURS = (BLUE, "#d9822b", "#2a9d6f", "#b0457b")


@dataclass(frozen=True)
class Table:
    """Rows of text with a `note` below; `numeric` aligns all columns but the first to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    numeric: bool = True

    kind = "table"


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG text, with a caption that screen readers read, too."""

    svg: str
    caption: str

    kind = "figure"


@dataclass(frozen=True)
class Tile:
    """An image (a data URI) with a line of text; `good` frames it as right or wrong, None as neither."""

    image: str
    text: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Choice:
    """An answer in words; `good` as in `Tile`."""

    text: str
    good: bool | None = None


@dataclass(frozen=True)
class Gallery:
    """Queries with their answers: a text or image on the left, images or words on the right."""

    rows: Sequence[tuple[str | Tile, Sequence[Tile] | Sequence[Choice]]]
    note: str = ""

    kind = "gallery"


@dataclass(frozen=True)
class Section:
    """A titled part of a page, with an introducing text."""

    title: str
    parts: Sequence[Table | Figure | Gallery]
    text: str = ""


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        title: of the browser's tab and of the page.
        lead: one or two sentences on what was done.
        figures: the few numbers that matter: name -> (value, what to compare it with).
        sections: the body.
        facts: small print at the end: versions, seed, hardware.
    """

    title: str
    lead: str
    figures: Mapping[str, tuple[str, str]]
    sections: Sequence[Section]
    facts: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """Return the page as one self-contained document; all text is escaped."""
        from jinja2 import Environment

        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.tests["tile"] = lambda value: isinstance(value, Tile)
        return environment.from_string(template).render(page=self)


def thumbnail(image: Image.Image, side: int = 96) -> str:
    """Return a data URI of an image, at most `side` pixels high and wide; small images keep their pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    is_glyph = max(image.size) <= 64  # JPEG would smear it, and PNG is smaller
    file_format = "png" if is_glyph else "jpeg"
    small.save(buffer, file_format, quality=85)
    return f"data:image/{file_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def line_chart(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> str:
    """Return an SVG of curves over a common axis; `series` is name -> (xs, ys)."""
    drawing = _drawing(6.4, 2.8)
    axes = drawing.subplots()
    for (name, (xs, ys)), colour in zip(series.items(), COLOURS, strict=False):
        marker = "o" if len(xs) < 20 else None
        axes.plot(xs, ys, color=colour, linewidth=1.8, label=name, marker=marker, markersize=4)
    axes.set(xlabel=x, ylabel=y)
    if len(series) > 1:
        axes.legend(frameon=False)
    return _svg(drawing)


def trade_off_chart(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    marks: Mapping[str, int],
    limit: float,
    x: str,
    y: str,
) -> str:
    """Return an SVG of curves through points (x, y), with a vertical line at the limit of x.

    Args:
        curves: name -> points in their order.
        marks: text to write beside a point of the first curve -> index of the point.
        limit: the budget.
        x, y: the labels of the axes.
    """
    drawing = _drawing(6.4, 3.6)
    axes = drawing.subplots()
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1.8, label=name, marker="o", markersize=4)
    first = next(iter(curves.values()))
    for text, index in marks.items():
        axes.annotate(text, first[index], xytext=(6, 6), textcoords="offset points", fontsize=9)
    axes.axvline(limit, color=GREY, linestyle="--", linewidth=1.2)
    axes.annotate("budget", (limit, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=9, ha="right")
    axes.set(xlabel=x, ylabel=y)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return _svg(drawing)


def bar_chart(bars: Mapping[str, tuple[float, float]], x: str, labels: tuple[str, str] = ("model", "chance")) -> str:
    """Return an SVG of horizontal bars in percent, each with a baseline.

    Args:
        bars: name -> (fraction, fraction of the baseline).
        x: the label of the axis.
        labels: what the bars and the baselines are called.
    """
    drawing = _drawing(6.4, 0.42 * len(bars) + 0.9)
    axes = drawing.subplots()
    positions = range(len(bars))
    axes.barh(positions, [100 * value for value, _ in bars.values()], height=0.62, color=BLUE, label=labels[0])
    axes.barh(positions, [100 * baseline for _, baseline in bars.values()], height=0.62, color=GREY, label=labels[1])
    for position, (value, baseline) in enumerate(bars.values()):
        axes.text(100 * max(value, baseline) + 1, position, f"{100 * value:.1f}", va="center", fontsize=9)
    axes.set_yticks(positions, list(bars))
    axes.set(xlim=(0, 108), xlabel=x)
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return _svg(drawing)


def _drawing(width: float, height: float) -> Drawing:
    from matplotlib.figure import Figure as Drawing  # not pyplot: no global state, no window system

    return Drawing(figsize=(width, height), layout="constrained")


def _svg(drawing: Drawing) -> str:
    import matplotlib

    for axes in drawing.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "clipkit"}):
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
