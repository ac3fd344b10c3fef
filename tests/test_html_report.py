"""Reports: one file, text escaped, pictures inside."""

import re

from PIL import Image

from clipkit.html_report import Choice, Figure, Gallery, Page, Section, Table, Tile, bar_chart, line_chart, thumbnail


def page():
    tile = Tile(thumbnail(Image.new("RGB", (20, 20), "red")), "<b>name</b>", True)
    parts = [
        Table(["a", "b"], [["x & y", "1"]], note="a note"),
        Figure(line_chart({"loss": ([1, 2, 3], [3.0, 2.0, 1.0])}, "step", "loss"), "falls"),
        Figure(bar_chart({"recall": (0.5, 0.1)}, "%"), "bars"),
        Gallery([("query <script>", [tile, tile]), (tile, [Choice("right", True), Choice("wrong", False)])]),
    ]
    return Page("A <title>", "lead", {"figure": ("50 %", "chance 10 %")}, [Section("One", parts)], {"seed": "0"}).html()


def test_text_is_escaped_and_nothing_is_fetched():
    html = page()
    assert "<script" not in html
    assert "<b>name</b>" not in html
    assert "&lt;b&gt;name&lt;/b&gt;" in html
    assert "x &amp; y" in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert html.count("<svg") == 2
    assert html.count('class="tile good"') == 3
    assert html.count("choice bad") == 1


def test_the_same_content_gives_the_same_bytes():
    assert page() == page()


def test_thumbnails_are_small():
    photo = Image.effect_noise((2000, 1000), 80).convert("RGB")
    assert len(thumbnail(photo)) < 12_000
    assert thumbnail(photo).startswith("data:image/jpeg;base64,")
    assert thumbnail(Image.new("L", (32, 32))).startswith("data:image/png;base64,")
