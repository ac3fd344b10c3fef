"""Every error that clipkit raises on purpose.

    ClipkitError                 exit code 1
    ├── UsageError               2   a wrong option, a missing extra, a batch larger than the data
    │   └── ConfigError          2   an unknown or ill-typed key of a config
    ├── DataError                3   a table, caption or label that cannot be used
    │   └── BadImage             3   one image that cannot be used; carries a reason code
    ├── TooManyRejected          4   more bad rows than the user allowed
    ├── ResourceError            5   disk, memory, permissions
    ├── CorruptArtefact          6   a model, index or checkpoint that is not what was saved
    │   └── ModelMismatch        6   two artefacts of different models, mixed
    ├── ModelError               2   a model that cannot be opened as asked
    └── Interrupted             75   stopped by a signal; can be resumed

A message says what was expected and what was found, then where, then how to fix it: in Python for callers
of the library, in the shell's syntax for users of a command (see `option`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator
from typing import ClassVar, TypeAlias

FrontEnd: TypeAlias = Callable[[str, object], str]
"""How an option with this name (as in Python) and value is typed; the value None: the name alone."""


class ClipkitError(Exception):
    """Base of all clipkit errors.

    Args:
        message: what was expected and what was found.
        where: file, row, column or key, as the user would look for it.
        fix: what to type or change.
        code: short reason, e.g. ``MISSING``, ``EMPTY_TABLE``, ``BAD_JSON``; None where a reader needs none.
        topic: what part of a model the error is about, e.g. ``weights``, as `clipkit check model` names it.

    Attributes:
        message: with the code in front, as it is printed.
        detail: the message without its code.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        where: object = None,
        fix: str | None = None,
        code: str | None = None,
        topic: str | None = None,
    ) -> None:
        self.detail = message
        self.message = message if code is None else f"{code}: {message}"
        self.where = None if where is None else str(where)
        self.fix = fix
        self.code = code
        self.topic = topic
        lines = [self.message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:  # subclasses have other arguments, and errors cross processes
        return _rebuild, (type(self), str(self), self.__dict__)


def _rebuild(error_class: type[ClipkitError], text: str, state: dict[str, object]) -> ClipkitError:
    error = error_class.__new__(error_class, text)
    error.__dict__.update(state)
    return error


class UsageError(ClipkitError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class ModelError(ClipkitError):
    exit_code = 2


class DataError(ClipkitError):
    exit_code = 3


class BadImage(DataError):
    """An image that cannot be used.

    Args:
        code: short reason, e.g. ``EMPTY``, ``NOT_IMAGE``, ``TRUNCATED``, ``TOO_LARGE``.
        message: the reason in words.
        where: the file's name, or a description of the object that was passed.
    """

    code: str

    def __init__(self, code: str, message: str, *, where: object = None, fix: str | None = None) -> None:
        super().__init__(message, where=where, fix=fix, code=code)

    @property
    def reason(self) -> str:
        """The message without its code, and the fix: for one line of a list."""
        return f"{self.detail}; {self.fix}" if self.fix else self.detail

    def or_skip(self) -> BadImage:
        """Return the same error with a fix that says how to leave such images out."""
        skip = f"leave out what cannot be used with {option('on_bad', 'skip')}"
        fix = f"{self.fix}, or {skip}" if self.fix else skip
        return BadImage(self.code, self.detail, where=self.where, fix=fix)


class TooManyRejected(ClipkitError):
    exit_code = 4


class ResourceError(ClipkitError):
    exit_code = 5


class CorruptArtefact(ClipkitError):
    exit_code = 6


class ModelMismatch(CorruptArtefact):
    pass


class Interrupted(ClipkitError):
    exit_code = 75


def option(name: str, value: object = None, *, python: str | None = None) -> str:
    """Return an option as the user would type it in the current front end, for the `fix` of an error.

    Args:
        name: as in Python; ``model.freeze`` where the config's section is needed to tell which.
        value: what to set it to; None: the name alone.
        python: what a Python user types, where that is not an argument of this name.

    >>> option("on_bad", "skip")  # `--on-bad skip` or `train.on_bad=skip` in a shell
    'on_bad="skip"'
    """
    text = _front_end(name, value)
    return text if python is None else typed(python=python, shell=text)


def typed(*, python: str, shell: str) -> str:
    """Return the one of two texts that fits the current front end, for input that is not an option."""
    return python if _front_end is as_python else shell


def as_python(name: str, value: object) -> str:
    """Return an option as a Python argument: ``on_bad="skip"``."""
    name = name.rpartition(".")[2]
    if value is None:
        return name
    in_double_quotes = isinstance(value, str | list | tuple)  # as in the documentation
    text = json.dumps(value, ensure_ascii=False) if in_double_quotes else repr(value)
    if isinstance(value, tuple):
        text = f"({text[1:-1]})"
    return f"{name}={text}"


def as_option(name: str, value: object) -> str:
    """Return an option as a program takes it: ``--on-bad skip``."""
    flag = f"--{name.rpartition('.')[2].replace('_', '-')}"
    return flag if value is None else f"{flag} {shlex.quote(str(value))}"


_front_end: FrontEnd = as_python


@contextlib.contextmanager
def speaking(front_end: FrontEnd) -> Iterator[None]:
    """Make `option` write in the syntax of this front end within the block."""
    global _front_end
    before = _front_end
    _front_end = front_end
    try:
        yield
    finally:
        _front_end = before


@contextlib.contextmanager
def within(section: str, names: Collection[str]) -> Iterator[None]:
    """Make `option` write these names as settings of a config's section, such as ``evaluate.reference``."""
    outer = _front_end

    def front_end(name: str, value: object) -> str:
        return outer(f"{section}.{name}" if name in names else name, value)

    with speaking(outer if outer is as_python else front_end):
        yield


def exit_with_message(program: Callable[[], object]) -> None:
    """Run a program; a ClipkitError ends it with its message on standard error, and its exit code.

    So does an error of the operating system about a file (no permission, too long a name), with the exit code of a
    ResourceError.
    """
    try:
        program()
    except ClipkitError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"error: {error.strerror}\n  where: {os.fsdecode(error.filename)}\n")
        sys.exit(ResourceError.exit_code)
