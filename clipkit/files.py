"""Write files so that they appear complete or not at all (`publish`), and hash, list and check them.

A reader sees the old target or the new one, complete, whatever happens in between: the new one is
written beside it, synced to disk, and renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import xxhash

from clipkit.errors import CorruptArtefact, ResourceError, UsageError, option

FileHash: TypeAlias = Literal["sha256", "xxh3"]
FILE_HASHES: tuple[FileHash, ...] = ("sha256", "xxh3")
_HASHERS: Mapping[FileHash, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3": xxhash.xxh3_128}
_HASH_TITLES: Mapping[FileHash, str] = {"sha256": "SHA-256", "xxh3": "XXH3"}


def publish(target: str | os.PathLike[str], write: Callable[[Path], None], *, replace: bool = False) -> None:
    """Make `target` appear complete, or not at all.

    Args:
        target: the file or folder to create; its parents are created.
        write: is called with a path beside `target` and creates a file or a folder there.
        replace: whether an existing target may be replaced. A file is replaced in one rename; a
            folder is first renamed aside, and put back if the second rename fails.

    Raises:
        UsageError: `target` exists and `replace` is false.
        ResourceError: no space or no permission; `target` is as it was before.
    """
    target = Path(target).absolute()
    if target.exists() and not replace:
        raise UsageError(
            "the target exists already", where=target, fix=f"choose another path, or {option('overwrite', True)}"
        )
    with resource_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            fresh = room / target.name
            write(fresh)
            for path in [fresh, *fresh.rglob("*")] if fresh.is_dir() else [fresh]:
                _open_to_others(path)
                _fsync(path)
            _swap(fresh, target, room / "old")
            _fsync(target.parent)
        finally:
            if target.exists() or not (room / "old").exists():  # never the last copy
                shutil.rmtree(room, ignore_errors=True)


def require_free(target: str | os.PathLike[str] | None, overwrite: bool) -> None:
    """Raise UsageError if something is at `target` that may not be replaced; call it before long work."""
    if target is None or not Path(target).exists():
        return
    if Path(target).is_dir():
        raise UsageError("a folder is at this path, where a file is to be written", where=target)
    if not overwrite:
        raise UsageError(
            "there is a file at this path already", where=target, fix=f"{option('overwrite', True)}, or another path"
        )


def _swap(fresh: Path, target: Path, aside: Path) -> None:
    if not target.is_dir():
        fresh.replace(target)  # atomic for files, and for a folder where there is none yet
        return
    target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        aside.rename(target)
        raise


def _open_to_others(path: Path) -> None:
    # safetensors writes 0600 whatever the umask; a shared folder then cannot be read by the group
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def resource_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission, while `target` is written, into a ResourceError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(nearest(target)).free
            raise ResourceError(
                f"the disk is full ({free / 2**20:,.0f} MiB free)", where=target, fix="free some space and run again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError("cannot write here", where=target, fix="choose a folder you may write to") from error
        raise


def nearest(path: Path) -> Path:
    """Return the path itself, or the first of its parents, that exists."""
    return next(parent for parent in [path, *path.parents] if parent.exists())


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    return hash_file(path, "sha256")["sha256"]


def hash_file(path: str | os.PathLike[str], *hashes: FileHash) -> dict[FileHash, str]:
    """Return hashes of a file's bytes, in hex, in one pass: SHA-256, or XXH3 of 128 bits.

    XXH3 takes a tenth of the time and finds accidents; it does not protect against someone who makes two files with
    one hash on purpose. Both let other threads run.
    """
    digests: dict[FileHash, Any] = {name: _HASHERS[name]() for name in hashes}
    buffer = memoryview(bytearray(2**22))
    with Path(path).open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            for digest in digests.values():
                digest.update(buffer[:size])
    return {name: digest.hexdigest() for name, digest in digests.items()}


def list_files(
    folder: Path, *hashes: FileHash, without: str | None = None, only: str = "*"
) -> dict[str, dict[str, Any]]:
    """Return what a manifest holds of the files in a folder: path within the folder -> its ``size`` and hashes.

    Args:
        folder: its files are listed in order, those in folders below it, too.
        hashes: which to compute.
        without: the name of files that are left out, such as the manifest itself.
        only: the name of files that are listed, or a pattern.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob(only)):
        if path.is_file() and path.name != without:
            name = path.relative_to(folder).as_posix()
            entry: dict[str, Any] = {"size": path.stat().st_size}
            for hash_name, digest in hash_file(path, *hashes).items():
                entry[hash_name] = digest
            files[name] = entry
    return files


def file_damage(path: Path, expected: Mapping[str, Any], file_hash: FileHash, owner: str) -> str | None:
    """Return what is wrong with a file, in a sentence; None if it is as it was listed.

    Args:
        path: of the file.
        expected: its entry in the manifest, as `list_files` wrote it.
        file_hash: which hash to compare; where the entry has the other one alone, that one.
        owner: what the file is part of, for the sentence: ``model``.
    """
    if not path.is_file():
        return f"a file of the {owner} is missing"
    size = path.stat().st_size
    if size != expected.get("size"):
        return f"a file of the {owner} has {size} bytes instead of {expected.get('size')}"
    if file_hash not in expected:
        file_hash = "sha256" if "sha256" in expected else "xxh3"
    if hash_file(path, file_hash)[file_hash] != expected.get(file_hash):
        return f"a file of the {owner} is not what was saved (its {_HASH_TITLES[file_hash]} differs)"
    return None


def dump_json(value: Any, *, indent: int | None = 2) -> str:
    r"""Return `value` as JSON text; a path becomes its name. With `indent` None, the text is one line.

    A file's name that is not UTF-8 comes out as escapes that give it back: ``os.fsencode(json.loads(text))``.
    NaN and infinities are refused: no other JSON reader takes them.

    >>> dump_json("caf\udce9")
    '"caf\\udce9"\n'
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=_path_name)
    return re.sub("[\ud800-\udfff]", lambda surrogate: f"\\u{ord(surrogate[0]):04x}", text) + "\n"


def _path_name(value: object) -> str:
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Publish `value` as a JSON file, replacing an older one."""
    text = dump_json(value)
    publish(path, lambda fresh: _write_text(fresh, text), replace=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Publish a UTF-8 text file, replacing an older one.

    A file's name that is not UTF-8 is written as its bytes are (`os.fsencode`).
    """
    publish(path, lambda fresh: _write_text(fresh, text), replace=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder.

    Raises:
        CorruptArtefact: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptArtefact(
            f"not a JSON file: {error}", where=path, fix="download or save the model again"
        ) from error
    if not isinstance(value, dict):
        message = f"a JSON object was expected, found {type(value).__name__}"
        raise CorruptArtefact(message, where=path, fix="download or save the model again")
    return value


def content_hash(content: bytes | str) -> bytes:
    """Return the SHA-256 of bytes, or of a text's UTF-8."""
    return hashlib.sha256(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content).digest()


def json_hash(value: Any) -> str:
    """Return the first 16 hex characters of SHA-256 over a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
