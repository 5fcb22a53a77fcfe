"""Where the files of an image folder lie: a directory, or a zip archive, of which nothing is extracted."""

import hashlib
import itertools
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from ev3_distill.data.sources.image_decode import Unreadable
from ev3_distill.data.sources.zip_reader import Archive
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import sha256_of

_SPAN = 256  # files that a thread reads before it asks for more


class Container(Protocol):
    """Files by name, with / between the folders that they lie in."""

    files: list[str]
    folders: list[str]

    def fingerprint(self, names: Sequence[str]) -> str:
        """The SHA-256 of these files or of more, in hexadecimal."""

    def content(self, name: str) -> bytes:
        """A file's bytes; may be called by several threads. Raises Unreadable."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is there for a system, not for the user."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def opened(path: Path) -> Container:
    """What a path names: a directory, a zip file, or a directory with one zip file and no other.

    Raises:
      InputError: it names none of these.
    """
    if path.is_dir():
        directory = _listed(path)
        zips = [name for name in directory.files if name.lower().endswith(".zip")]
        return Zip(path / zips[0]) if len(zips) == 1 == len(directory.files) else directory
    if path.is_file():
        return Zip(path)
    raise InputError(f"folder:DIR needs a directory or a zip file; got {path}, which is missing: check the path")


def _listed(path: Path) -> "Directory":
    try:
        return Directory(path)
    except OSError as error:
        raise InputError(
            f"folder:DIR needs leave to read what it holds; got {error.filename} ({error.strerror}): change its permissions"
        ) from None


class Directory:
    """A directory with all that lies below it, hidden files and folders left out."""

    def __init__(self, root: Path):
        """Lists it."""
        self.root = root
        self.files: list[str] = []
        self.folders: list[str] = []
        self._digests: dict[str, bytes] = {}
        self._list("", ())

    def _list(self, folder: str, above: tuple[tuple[int, int], ...]) -> None:
        about = os.stat(self.root / folder)
        if (about.st_dev, about.st_ino) in above:
            return  # a link to a folder that it lies in
        above = (*above, (about.st_dev, about.st_ino))
        with os.scandir(self.root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{folder}{entry.name}"
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    self.folders.append(name)
                    self._list(f"{name}/", above)
                elif entry.is_file():
                    self.files.append(name)

    def fingerprint(self, names: Sequence[str]) -> str:
        """The SHA-256 of files' names and bytes, in hexadecimal."""
        spans = [names[start : start + _SPAN] for start in range(0, len(names), _SPAN)]
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda span: [self._digest(name) for name in span], spans)
            self._digests = dict(zip(names, itertools.chain.from_iterable(digests), strict=True))
        lines = (os.fsencode(name) + b"\0" + digest for name, digest in self._digests.items())
        return hashlib.sha256(b"".join(hashlib.sha256(line).digest() for line in lines)).hexdigest()

    def _digest(self, name: str) -> bytes:
        try:
            return hashlib.sha256(self._bytes(name)).digest()
        except OSError as error:
            return hashlib.sha256(str(error.errno).encode()).digest()

    def _bytes(self, name: str) -> bytes:
        with open(f"{self.root}/{name}", "rb", buffering=0) as file:
            return file.read()

    def content(self, name: str) -> bytes:
        """A file's bytes, the very ones that the fingerprint was taken of."""
        try:
            content = self._bytes(name)
        except OSError as error:
            raise Unreadable(error.strerror) from None
        if hashlib.sha256(content).digest() != self._digests[name]:
            raise InputError(f"{self.root / name} must stay as it is while it is read; got a change: run again")
        return content


class Zip:
    """A zip archive; its members are read where they lie."""

    def __init__(self, path: Path):
        """Lists it."""
        try:
            self._archive = Archive(path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(
                f"folder:FILE must be a whole zip file; got {path} ({error}): pack it again, or name a directory"
            ) from None
        named = [(member.filename.replace("\\", "/").strip("/"), member) for member in self._archive.members]
        self.folders = _and_those_above(named)
        self._members = {name: member for name, member in named if not member.is_dir() and not is_hidden(name)}
        self.files = sorted(self._members)
        twice = len([1 for name, member in named if not member.is_dir() and not is_hidden(name)]) - len(self.files)
        if twice:
            raise InputError(f"{path}: a name must occur once; got {twice} that occur again: pack it again")

    def fingerprint(self, names: Sequence[str]) -> str:
        """The SHA-256 of the archive as a file, in hexadecimal."""
        del names
        return sha256_of(self._archive.path)

    def content(self, name: str) -> bytes:
        """A member's bytes, checked against the archive's checksum."""
        try:
            return self._archive.content(self._members[name])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise Unreadable(" ".join(str(error).split())) from None


def _and_those_above(named: list[tuple[str, zipfile.ZipInfo]]) -> list[str]:
    """All folders: those with a member of their own, and those that only occur in names."""
    folders = {name for name, member in named if member.is_dir()}
    for name, _ in named:
        while name := name.rpartition("/")[0]:
            folders.add(name)
    return sorted(folder for folder in folders if folder and not is_hidden(folder))
