"""Atomic writes of files and directories, digests, and the cache directory."""

import hashlib
from pathlib import Path

import pytest

from ev3_distill.runtime.files import atomic_directory, atomic_write, cache_root, sha256_of


def test_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert sha256_of(path) == hashlib.sha256(b"new").hexdigest()
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_directory_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "a"
    with atomic_directory(path) as temporary:
        (temporary / "file").write_text("content")
        assert not path.exists()
    assert (path / "file").read_text() == "content"
    with pytest.raises(OSError, match="not empty"), atomic_directory(path) as temporary:
        (temporary / "other").touch()
    assert [child.name for child in path.iterdir()] == ["file"]
    assert list(path.parent.iterdir()) == [path]


def test_directory_is_overwritten_and_leftovers_of_killed_processes_are_removed(tmp_path):
    path, stale = tmp_path / "a", tmp_path / ".a.123.tmp"
    for directory in (path, stale):
        directory.mkdir()
        (directory / "old").touch()
    with pytest.raises(ValueError, match="broken"), atomic_directory(path, overwrite=True):
        raise ValueError("broken")
    assert (path / "old").exists()
    with atomic_directory(path, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert [child.name for child in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.setenv("EV3_DISTILL_CACHE", "~/own")
    assert cache_root() == Path.home() / "own"
    monkeypatch.delenv("EV3_DISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_root() == Path("/caches/ev3-distill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "ev3-distill"
