"""Every error crosses a process as itself."""

import pickle

import pytest

from clipkit import errors
from clipkit.errors import BadImage, ClipkitError, exit_with_message, option, speaking, within
from clipkit.texts import BadText
from clipkit.training.config.errors import as_setting


def error_classes(base=ClipkitError):
    yield base
    for subclass in base.__subclasses__():
        yield from error_classes(subclass)


def test_all_errors_survive_pickling():
    made = [BadImage("EMPTY", "no bytes", where="a.jpg", fix="copy it again"), BadText("EMPTY_TEXT", "empty")]
    others = [error_class for error_class in error_classes() if error_class not in (BadImage, BadText)]
    made += [error_class("message", where="there", fix="fix it") for error_class in others]
    for error in made:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


def test_exit_codes_are_those_of_the_tree():
    codes = {error_class.__name__: error_class.exit_code for error_class in error_classes()}
    for line in errors.__doc__.splitlines():
        words = line.replace("─", " ").replace("├", " ").replace("└", " ").replace("│", " ").split()
        if words and words[0] in codes:
            number = next(word for word in words if word.isdigit())
            assert codes[words[0]] == int(number), words[0]


def test_a_program_ends_with_the_message_and_the_code(capsys):
    def program():
        raise BadImage("EMPTY", "no bytes", where="a.jpg", fix="copy it again")

    with pytest.raises(SystemExit) as stop:
        exit_with_message(program)
    assert stop.value.code == 3
    assert capsys.readouterr().err == "error: EMPTY: no bytes\n  where: a.jpg\n  fix:   copy it again\n"


def test_a_fix_is_written_as_the_user_types():
    assert (option("on_bad", "skip"), option("max_bad", 3), option("train.max_bad")) == (
        'on_bad="skip"',
        "max_bad=3",
        "max_bad",
    )
    with speaking(as_setting):
        assert option("on_bad", "skip", python="unused") == "train.on_bad=skip"
        assert option("text", ["title", "a b"]) == "data.text='title,a b'"
        assert option("model.freeze", ["image"]) == "model.freeze=image"
    assert option("model.freeze", ["image"], python='model.freeze("image")') == 'model.freeze("image")'


def test_a_setting_of_the_reference_is_named_as_its_own():
    with speaking(as_setting), within("evaluate.reference", ["text"]):
        assert option("text", "caption") == "evaluate.reference.text=caption"
        assert option("on_bad", "skip") == "train.on_bad=skip"
    with within("evaluate.reference", ["text"]):
        assert option("text", "caption") == 'text="caption"'


def test_a_code_stands_before_the_message_and_can_be_read_without_it():
    error = errors.DataError("no such file", where="a.csv", code="MISSING")
    assert str(error).splitlines()[0] == error.message == "MISSING: no such file"
    assert (error.code, error.detail) == ("MISSING", "no such file")
    plain = errors.ModelError("weights are missing", topic="weights")
    assert (plain.code, plain.message, plain.topic) == (None, plain.detail, "weights")
