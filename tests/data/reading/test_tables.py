"""Tables come back as they were written, or not at all."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest

from clipkit.data.reading.table import Table
from clipkit.data.reading.tables import read_table
from clipkit.data.reading.text_files import TextFormat, checked_format
from clipkit.errors import DataError, UsageError


def written(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_table(path, **options)
    return caught.value


def rows_of(table: Table) -> list[tuple[Any, ...]]:
    return list(zip(*(table.cells(name) for name in table.names), strict=True))


# ------------------------------------------------------------------------------------------------------ what is kept


def test_cells_are_text_as_it_stands(tmp_path: Path) -> None:
    words = ["None", "NA", "null", "nan", "NaN", "007", "1e3", "2024-01-02", "True", " padded ", "", "  ", "#N/A", "-"]
    table = read_table(written(tmp_path, "image,text\n" + "".join(f"{n}.jpg,{word}\n" for n, word in enumerate(words))))
    assert table.cells("text") == words


@pytest.mark.parametrize("sep", [",", "\t", ";", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_round_trip_against_the_csv_module(tmp_path: Path, sep: str, end: str) -> None:
    draw = random.Random(f"{sep}{end}")
    alphabet = [*'ab"', sep, " ", "é", "漢", "\u2028", "\x0c", "\n", "\r\n", "'", "\\", ""]
    for trial in range(40):
        width = draw.randint(2, 4)
        header = [f"c{n}" for n in range(width)]
        rows = [
            ["".join(draw.choices(alphabet, k=draw.randint(0, 6))) for _ in header] for _ in range(draw.randint(1, 8))
        ]
        text = io.StringIO()
        quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL  # else the writer leaves a \n bare
        csv.writer(text, delimiter=sep, lineterminator=end, quoting=quoting).writerows([header, *rows])
        path = written(tmp_path, text.getvalue(), f"{trial}.csv")
        table = read_table(path, TextFormat(sep))
        assert rows_of(table) == [tuple(row) for row in rows]


def test_every_row_knows_its_line(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, 'image,text\r\n\r\na.jpg,"two\r\nlines"\r\nb.jpg,one\r\n\r\nc.jpg,last'))
    assert table.cells("text") == ["two\r\nlines", "one", "last"]
    assert table.lines == [3, 5, 7]
    assert table.where(1) == f"{tmp_path / 't.csv'}:5"


def test_quotation_marks_within_a_word_stay(tmp_path: Path) -> None:
    assert read_table(written(tmp_path, 'image,text\na.jpg,a 5" nail\n')).cells("text") == ['a 5" nail']


def test_byte_order_marks(tmp_path: Path) -> None:
    text = "image,text\na.jpg,naïve\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        table = read_table(written(tmp_path, text.encode(encoding)))
        assert (table.names, table.cells("text")) == (["image", "text"], ["naïve"])
    assert read_table(written(tmp_path, text.encode("cp1252")), TextFormat(encoding="cp1252")).cells("text") == [
        "naïve"
    ]


def test_names_in_the_header_are_trimmed_and_numbered(tmp_path: Path) -> None:
    assert read_table(written(tmp_path, ",image, text \n0,a.jpg,b\n")).names == ["column 1", "image", "text"]


def test_a_tsv_needs_no_separator(tmp_path: Path) -> None:
    assert read_table(written(tmp_path, "image\ttext\na.jpg\tone, two\n", "t.TSV")).cells("text") == ["one, two"]
    assert read_table(written(tmp_path, "image;text\na.jpg;b\n", "t.txt"), TextFormat(";")).names == ["image", "text"]


def test_a_long_cell_is_read_and_the_limit_of_the_process_kept(tmp_path: Path) -> None:
    csv.field_size_limit(before := 131_072)
    assert len(read_table(written(tmp_path, f"image,text\na.jpg,{'x' * 200_000}\n")).cells("text")[0]) == 200_000
    with pytest.raises(DataError) as caught:
        read_table(written(tmp_path, f'image,text\na.jpg,"{"x" * 17_000_000}"\n'))
    assert str(caught.value).startswith("FIELD_SIZE")  # while the error is held, the limit is back already
    assert csv.field_size_limit() == before
    error = refused(written(tmp_path, "image,text\na.jpg,x,y\n"))
    assert (csv.field_size_limit(), error.message[:6]) == (before, "FIELDS")


# ----------------------------------------------------------------------------------------------------- what is refused

CSV_FAULTS: list[tuple[str, str | bytes, str, int | None, str]] = [
    ("quote-open-to-the-end", 'image,text\na.jpg,"dog\nb.jpg,cat\n', "QUOTE", 2, 'quoting="none"'),
    ("quote-in-the-middle", 'image,text\na.jpg,x\nb.jpg,"dog" runs\n', "QUOTE", 3, "not balanced"),
    ("quote-over-rows", 'image,text\na.jpg,"dog\nb.jpg,"cat"\n', "QUOTE", 2, "not balanced"),
    ("quote-swallows-rows", 'image,text\na.jpg,"dog\nb.jpg,cat"\nc.jpg,x\n', "QUOTE", 2, "looks like another row"),
    ("quote-closes-in-the-next-row", 'image,text,n\na.jpg,"x,1\nb.jpg,y",2\n', "QUOTE", 2, "looks like another row"),
    ("quote-opens-in-the-text", 'text,image\n"x,a.jpg\ny",b.jpg\n', "QUOTE", 2, "looks like another row"),
    ("quote-opens-in-row-3", 'image,text\na.jpg,"two\nlines"\nb.jpg,"x\nc.jpg,y\n', "QUOTE", 4, "not balanced"),
    ("backslash", 'image,text\na.jpg,"a \\"big\\" dog"\n', "QUOTE", 2, 'quoting="backslash"'),
    ("one-field-more", "image,text\na.jpg,one, two\n", "FIELDS", 2, "expected 2 fields as in the header, found 3"),
    ("one-field-less", "image,text,label\na.jpg,x,y\nb.jpg,x\n", "FIELDS", 3, "expected 3 fields"),
    ("not-utf-8", "image,text\na.jpg,x\nb.jpg,caf\xe9\n".encode("latin-1"), "ENCODING", 3, "byte 0xe9 at offset 28"),
    ("nul", "image,text\na.jpg,x\nb.jpg,a\0b\n", "NUL", 3, 'encoding="utf-16"'),
    ("utf-16-unmarked", "image,text\na.jpg,x\n".encode("utf-16-le"), "NUL", 1, 'encoding="utf-16"'),
    ("semicolons", "image;text\na.jpg;x\n", "SEPARATOR", 1, 'separator="semicolon"'),
    ("tabs", "image\ttext\na.jpg\tx\n", "SEPARATOR", 1, 'separator="tab"'),
    ("one-column", "image\na.jpg\n", "SEPARATOR", 1, "at least two columns"),
    ("name-twice", "image,text,text\na.jpg,x,y\n", "HEADER", 1, "occurs twice: text"),
    ("no-header", "a.jpg,a dog\nb.jpg,a cat\n", "HEADER", 1, "looks like data"),
    ("header-only", "image,text\n", "EMPTY_TABLE", None, "no row"),
    ("empty", "", "EMPTY_TABLE", None, "the file is empty"),
    ("blank", "\n \n", "EMPTY_TABLE", None, "the file is empty"),
]


@pytest.mark.parametrize(
    ("content", "code", "line", "words"), [f[1:] for f in CSV_FAULTS], ids=[f[0] for f in CSV_FAULTS]
)
def test_csv_fault(tmp_path: Path, content: str | bytes, code: str, line: int | None, words: str) -> None:
    path = written(tmp_path, content)
    error = refused(path)
    assert str(error).startswith(f"{code}: ")
    assert error.where == (f"{path}:{line}" if line else str(path))
    assert words in str(error)
    assert error.fix or code == "EMPTY_TABLE"
    assert error.exit_code == 3


def test_a_caption_of_several_lines_is_no_swallowed_row(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, 'image,text\na.jpg,"first, second\nthird, fourth"\n'))
    assert table.cells("text") == ["first, second\nthird, fourth"]


def test_a_spliced_fault_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    """One stray quotation mark anywhere: refused, or read with that mark in its cell. Never fewer rows."""
    rows = [(f"img/{n}.jpg", f"caption {n}, with a comma") for n in range(6)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image", "text"), *rows])
    clean = text.getvalue()
    outcomes = set()
    for at in range(clean.index("\n") + 1, len(clean)):
        path = written(tmp_path, clean[:at] + '"' + clean[at:])
        try:
            table = read_table(path)
        except DataError:
            outcomes.add("refused")
            continue
        outcomes.add("read")
        assert [tuple(cell.replace('"', "") for cell in row) for row in rows_of(table)] == rows
    assert outcomes == {"refused", "read"}


def test_quotation_marks_as_they_are_written(tmp_path: Path) -> None:
    path = written(tmp_path, 'image,text\na.jpg,"a \\"big\\" dog, here"\nb.jpg,plain\n')
    assert read_table(path, TextFormat(quoting="backslash")).cells("text") == ['a "big" dog, here', "plain"]
    path = written(tmp_path, 'image\ttext\na.jpg\t"big" dog\nb.jpg\t"\n', "t.tsv")
    assert read_table(path, TextFormat(quoting="none")).cells("text") == ['"big" dog', '"']


def test_a_swallowed_row_is_known_by_a_file_without_a_suffix(tmp_path: Path) -> None:
    (tmp_path / "two").touch()
    assert refused(written(tmp_path, 'image,text\none,"x\ntwo,y"\n')).message.startswith("QUOTE")
    assert len(read_table(written(tmp_path, 'image,text\none,"x\nthree,y"\n'))) == 1


def test_separators_by_their_names() -> None:
    words = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|", "\\t": "\t", ":": ":"}
    assert {word: checked_format(word, "utf-8", "double").separator for word in words} == words
    for separator, quoting in [("ab", "double"), ('"', "double"), ("", "double"), (None, "single")]:
        with pytest.raises(UsageError):
            checked_format(separator, "utf-8", quoting)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    assert "expected a file that ends in .csv" in str(refused(written(tmp_path, "x", "t.xlsx")))
    error = refused(tmp_path / "tt.csv") if written(tmp_path, "x") else None
    assert error is not None
    assert (str(error).startswith("MISSING"), error.fix) == (True, f"did you mean {tmp_path / 't.csv'}?")
    assert "ENCODING: unknown encoding" in str(
        refused(written(tmp_path, "a,b\nc,d"), form=TextFormat(encoding="utf-99"))
    )


# --------------------------------------------------------------------------------------------------------- JSON lines


def test_json_lines(tmp_path: Path) -> None:
    content = '\ufeff{"image": "a.jpg", "text": ["x", "y\\u00e9"]}\r\n\r\n{"image": "b.jpg", "n": 3}'
    table = read_table(written(tmp_path, content, "t.jsonl"))
    assert table.names == ["image", "text", "n"]
    assert rows_of(table) == [("a.jpg", ["x", "yé"], None), ("b.jpg", None, 3)]
    assert table.lines == [1, 3]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "b.jpg", "text": }', "Expecting value"),
        ('{"image": "b.jpg"', "Expecting"),
        ('["b.jpg", "x"]', "found list"),
        ("3", "found int"),
        ('{"image": "b.jpg", "text": NaN}', "NaN is not JSON"),
        ('{"image": "b.jpg", "score": -Infinity}', "-Infinity is not JSON"),
        ('{"image": "b.jpg", "text": "x", "text": "y"}', "'text' occurs twice"),
        ('{"image": "b.jpg", "text": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_set_aside_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    path = written(
        tmp_path, f'{{"image": "a.jpg", "text": "x"}}\n{line}\n{{"image": "c.jpg", "text": "z"}}\n', "t.jsonl"
    )
    table = read_table(path)
    assert table.cells("image") == ["a.jpg", "c.jpg"]
    (reject,) = table.rejects
    assert (reject.row, reject.code, reject.where) == (2, "BAD_JSON", f"{path}:2")
    assert words in reject.message


def test_a_json_array_is_no_json_lines(tmp_path: Path) -> None:
    assert "one JSON array" in str(refused(written(tmp_path, '[{"image": "a.jpg"}]', "t.json")))
    assert "no line is a JSON object" in str(refused(written(tmp_path, "oops\n", "t.jsonl")))


# ------------------------------------------------------------------------------------------------------------ Parquet


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "image": pa.array(["a.jpg", "b.jpg", None]),
        "text": pa.array(["007", None, "x"], pa.large_string()),
        "kind": pa.array(["u", "v", "u"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert rows_of(table) == [("a.jpg", "007", "u"), ("b.jpg", None, "v"), (None, "x", "u")]
    data = (tmp_path / "t.parquet").read_bytes()
    for broken in (data[:-30], data[:40] + b"\xff" * 60 + data[100:], b"no parquet at all"):
        assert "BAD_PARQUET" in str(refused(written(tmp_path, broken, "bad.parquet")))
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "none.parquet")
    assert "EMPTY_TABLE" in str(refused(tmp_path / "none.parquet"))
