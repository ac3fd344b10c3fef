"""publish(): the old target or the new one, whole, whatever happens in between."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from clipkit import files
from clipkit.errors import ResourceError, UsageError


def content(path):
    return {p.name: p.read_text() for p in path.iterdir()} if path.is_dir() else path.read_text()


def write_file(text):
    return lambda path: path.write_text(text)


def write_folder(text):
    def write(path):
        path.mkdir()
        for name in ("a", "b"):
            (path / name).write_text(text)

    return write


@pytest.mark.parametrize("kind", [write_file, write_folder])
def test_publishes_and_replaces_only_when_asked(tmp_path, kind):
    target = tmp_path / "sub" / "thing"
    files.publish(target, kind("old"))
    with pytest.raises(UsageError, match=r"exists already(?s:.)*thing"):
        files.publish(target, kind("new"))
    assert "old" in str(content(target))
    files.publish(target, kind("new"), replace=True)
    assert "new" in str(content(target))
    assert "old" not in str(content(target))
    assert [p.name for p in target.parent.iterdir()] == ["thing"]  # nothing is left beside it


class Fault(Exception):
    pass


def failing(monkeypatch, name, at, error):
    """Make the `at`-th call of an os function fail; returns the counter."""
    real, calls = getattr(os, name), []

    def fake(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, fake)
    return calls


@pytest.mark.parametrize("kind", [write_file, write_folder])
@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_fault_at_any_call_leaves_the_old_one(tmp_path, monkeypatch, kind, call):
    reached = 0
    for at in range(1, 12):
        target = tmp_path / f"{at}"
        files.publish(target, kind("old"))
        with monkeypatch.context() as patch:
            calls = failing(patch, call, at, Fault())
            try:
                files.publish(target, kind("new"), replace=True)
            except Fault:
                reached += 1
        if len(calls) < at:
            break
        text = str(content(target))
        assert ("old" in text) != ("new" in text)
        assert [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    assert reached or call in ("rename", "replace")


def test_writing_in_place_would_not_survive_this(tmp_path):
    target = tmp_path / "thing"
    files.publish(target, write_file("old"))

    def half(path):
        path.write_text("ne")
        raise Fault

    with pytest.raises(Fault):
        files.publish(target, half, replace=True)
    assert target.read_text() == "old"
    with pytest.raises(Fault):  # what publish is there to prevent
        half(target)
    assert target.read_text() == "ne"


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    events = []
    real_sync, real_rename = os.fsync, os.replace

    def sync(fd):
        events.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        real_sync(fd)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *a, **k: (events.append("RENAME"), real_rename(*a, **k)))
    files.publish(tmp_path / "thing", write_folder("x"))
    assert sorted(events[: events.index("RENAME")]) == ["a", "b", "thing"]
    assert events[events.index("RENAME") + 1 :] == [tmp_path.name]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot write here")])
def test_resource_errors_say_so(tmp_path, monkeypatch, number, words):
    failing(monkeypatch, "fsync", 1, OSError(number, os.strerror(number)))
    with pytest.raises(ResourceError, match=words) as caught:
        files.publish(tmp_path / "thing", write_file("x"))
    assert caught.value.exit_code == 5
    assert not (tmp_path / "thing").exists()


def test_published_files_follow_the_umask(tmp_path):
    def private(path):
        path.touch(mode=0o600)  # as safetensors does

    old = os.umask(0o022)
    try:
        files.publish(tmp_path / "thing", private)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "thing").stat().st_mode) == 0o644


def test_json_is_strict_and_readable(tmp_path):
    files.write_json(tmp_path / "a.json", {"name": "é", "value": 0.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "é", "value": 0.5}
    with pytest.raises(ValueError, match="Out of range float"):
        files.dump_json({"value": float("nan")})


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea")  # FIPS 180-2, B.1


def test_a_listed_file_that_is_missing_cut_or_changed_is_named(tmp_path):
    (tmp_path / "below").mkdir()
    path = tmp_path / "below" / "a.bin"
    path.write_bytes(b"abc")
    (tmp_path / "manifest.json").write_text("{}")
    listed = files.list_files(tmp_path, "sha256", "xxh3", without="manifest.json")
    assert list(listed) == ["below/a.bin"]
    entry = listed["below/a.bin"]
    assert list(entry) == ["size", "sha256", "xxh3"]
    assert files.file_damage(path, entry, "sha256", "model") is None
    path.write_bytes(b"abd")
    for name, title in (("sha256", "SHA-256"), ("xxh3", "XXH3")):
        damage = files.file_damage(path, {"size": 3, name: entry[name]}, "sha256", "model")
        assert damage == f"a file of the model is not what was saved (its {title} differs)"
    path.write_bytes(b"ab")
    assert files.file_damage(path, entry, "xxh3", "model") == "a file of the model has 2 bytes instead of 3"
    path.unlink()
    assert files.file_damage(path, entry, "xxh3", "model") == "a file of the model is missing"
