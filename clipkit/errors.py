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

A message says what was expected and what was found, then where, then how to mend it: in Python to who calls Python,
in the shell's syntax to who typed a command (see `option`).
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
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: object = None, fix: str | None = None) -> None:
        self.message, self.where, self.fix = message, None if where is None else str(where), fix
        lines = [message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:  # subclasses have other arguments, and errors cross processes
        return _rebuild, (type(self), str(self), self.__dict__)


def _rebuild(kind: type[ClipkitError], text: str, state: dict[str, object]) -> ClipkitError:
    error = kind.__new__(kind, text)
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

    def __init__(self, code: str, message: str, *, where: object = None, fix: str | None = None) -> None:
        self.code = code
        super().__init__(f"{code}: {message}", where=where, fix=fix)

    @property
    def reason(self) -> str:
        """The message without its code, and the fix: for one line of a list."""
        return self.message.removeprefix(f"{self.code}: ") + (f"; {self.fix}" if self.fix else "")

    def or_skip(self) -> BadImage:
        """The same where images that cannot be used may be left out: the fix says how."""
        way = f"leave out what cannot be used with {option('on_bad', 'skip')}"
        fix = f"{self.fix}, or {way}" if self.fix else way
        return BadImage(self.code, self.message.removeprefix(f"{self.code}: "), where=self.where, fix=fix)


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
    """An option as the user would type it where they are, for the `fix` of an error.

    Args:
        name: as in Python; ``model.freeze`` where the config's section is needed to tell which.
        value: what to set it to; None: the name alone.
        python: what a Python user types, where that is not an argument of this name.

    >>> option("on_bad", "skip")  # `--on-bad skip` or `train.on_bad=skip` in a shell
    'on_bad="skip"'
    """
    written = _front_end(name, value)
    return written if python is None else typed(python=python, shell=written)


def typed(*, python: str, shell: str) -> str:
    """What the user types where they are, where that is no option."""
    return python if _front_end is as_python else shell


def as_python(name: str, value: object) -> str:
    """As an argument: ``on_bad="skip"``."""
    name = name.rpartition(".")[2]
    if value is None:
        return name
    plain = isinstance(value, str | list | tuple)  # in double quotes, as in the documentation
    text = json.dumps(value, ensure_ascii=False) if plain else repr(value)
    return f"{name}={f'({text[1:-1]})' if isinstance(value, tuple) else text}"


def as_option(name: str, value: object) -> str:
    """As an option of a program: ``--on-bad skip``."""
    flag = f"--{name.rpartition('.')[2].replace('_', '-')}"
    return flag if value is None else f"{flag} {shlex.quote(str(value))}"


_front_end: FrontEnd = as_python


@contextlib.contextmanager
def speaking(front_end: FrontEnd) -> Iterator[None]:
    """Within it, `option` writes as this front end is typed."""
    global _front_end
    before, _front_end = _front_end, front_end
    try:
        yield
    finally:
        _front_end = before


@contextlib.contextmanager
def within(section: str, names: Collection[str]) -> Iterator[None]:
    """Within it, settings of these names are those of this section of a config, such as ``evaluate.reference``."""
    outer = _front_end

    def front_end(name: str, value: object) -> str:
        return outer(f"{section}.{name}" if name in names else name, value)

    with speaking(outer if outer is as_python else front_end):
        yield


def exit_with_message(program: Callable[[], object]) -> None:
    """Run a program; a ClipkitError ends it with its message on standard error, and its exit code.

    So does what the system refuses (a file that may not be read, too long a name), with the code of a ResourceError.
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
