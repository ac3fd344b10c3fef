"""The process without clipkit, by which all that is saved is tested: it has to notice."""

from __future__ import annotations

from pathlib import Path

import pytest
from plain import run_plain


def test_a_script_gives_its_output_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "note.txt").write_text("here")
    monkeypatch.setenv("CLIPKIT_NOTE", "set")
    assert run_plain("import os\nprint(open('note.txt').read(), os.environ['CLIPKIT_NOTE'])", tmp_path) == "here set\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import clipkit", "clipkit is blocked"),
        ("from clipkit.models import dual_encoder", "clipkit is blocked"),
        ("assert 1 == 2, 'two numbers'", "two numbers"),
        ("1 +", "SyntaxError"),
        ("import sys; sys.modules['clipkit'] = sys", "AssertionError"),
        ("import sys; sys.exit('no')", "no"),
        ("import no_such_module", "no_such_module"),
    ],
)
def test_a_script_that_fails_is_a_failure(script: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=words):
        run_plain(script, tmp_path)
    assert run_plain("print(1)", tmp_path) == "1\n"  # the next one runs all the same


def test_nothing_stays_from_one_script_to_the_next(tmp_path: Path) -> None:
    run_plain("import os, math; math.mark = 1; os.environ['MARK'] = '1'", tmp_path)
    assert run_plain("import os, math; print(hasattr(math, 'mark'), 'MARK' in os.environ)", tmp_path) == "False False\n"
