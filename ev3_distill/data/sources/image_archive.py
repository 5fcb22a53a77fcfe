"""Where the files of an image folder are: in a directory, or in a zip archive, which is read without extracting it."""

import hashlib
import itertools
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from ev3_distill.data.sources.unreadable import Unreadable
from ev3_distill.data.sources.zip_reader import ZipReader
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import sha256_of

_SPAN = 256  # files per task of a thread


class Container(Protocol):
    """Files by name, with / between the names of folders."""

    files: list[str]
    folders: list[str]

    def fingerprint(self, names: Sequence[str]) -> str:
        """The SHA-256, in hexadecimal, of these files or of a superset."""

    def read(self, name: str) -> bytes:
        """Reads a file; several threads may call it. Raises Unreadable."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the operating system rather than to the user."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def open_container(path: Path) -> Container:
    """Opens a directory, a zip file, or the zip file that is the only file of a directory.

    Raises:
      InputError: `path` is none of these.
    """
    if path.is_dir():
        directory = _open_directory(path)
        zips = [name for name in directory.files if name.lower().endswith(".zip")]
        return ZipContainer(path / zips[0]) if len(zips) == 1 == len(directory.files) else directory
    if path.is_file():
        return ZipContainer(path)
    raise InputError(f"folder:DIR needs a directory or a zip file; got {path}, which does not exist: check the path")


def _open_directory(path: Path) -> "DirectoryContainer":
    try:
        return DirectoryContainer(path)
    except OSError as error:
        raise InputError(
            f"folder:DIR needs permission to read its content; got {error.filename} ({error.strerror}): change its "
            "permissions"
        ) from None


class DirectoryContainer:
    """A directory with everything below it, except hidden files and folders."""

    def __init__(self, root: Path):
        self.root = root
        self.files: list[str] = []
        self.folders: list[str] = []
        self._digests: dict[str, bytes] = {}
        self._list("", ())

    def _list(self, folder: str, ancestors: tuple[tuple[int, int], ...]) -> None:
        status = os.stat(self.root / folder)
        if (status.st_dev, status.st_ino) in ancestors:
            return  # a link to a folder that contains it
        ancestors = (*ancestors, (status.st_dev, status.st_ino))
        with os.scandir(self.root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{folder}{entry.name}"
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    self.folders.append(name)
                    self._list(f"{name}/", ancestors)
                elif entry.is_file():
                    self.files.append(name)

    def fingerprint(self, names: Sequence[str]) -> str:
        """The SHA-256 of names and contents, in hexadecimal."""
        spans = [names[start : start + _SPAN] for start in range(0, len(names), _SPAN)]
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda span: [self._digest(name) for name in span], spans)
            self._digests = dict(zip(names, itertools.chain.from_iterable(digests), strict=True))
        lines = (os.fsencode(name) + b"\0" + digest for name, digest in self._digests.items())
        return hashlib.sha256(b"".join(hashlib.sha256(line).digest() for line in lines)).hexdigest()

    def _digest(self, name: str) -> bytes:
        try:
            return hashlib.sha256(self._read(name)).digest()
        except OSError as error:
            return hashlib.sha256(str(error.errno).encode()).digest()

    def _read(self, name: str) -> bytes:
        with open(f"{self.root}/{name}", "rb", buffering=0) as file:
            return file.read()

    def read(self, name: str) -> bytes:
        """Reads a file, and checks that it is still the one that the fingerprint covers."""
        try:
            content = self._read(name)
        except OSError as error:
            raise Unreadable(error.strerror) from None
        if hashlib.sha256(content).digest() != self._digests[name]:
            raise InputError(f"{self.root / name} must not change while it is read; got a change: run again")
        return content


class ZipContainer:
    """A zip archive."""

    def __init__(self, path: Path):
        try:
            self._reader = ZipReader(path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(
                f"folder:FILE must be a complete zip file; got {path} ({error}): pack it again, or name a directory"
            ) from None
        named = [(member.filename.replace("\\", "/").strip("/"), member) for member in self._reader.members]
        self.folders = _all_folders(named)
        visible = [(name, member) for name, member in named if not member.is_dir() and not is_hidden(name)]
        self._members = dict(visible)
        self.files = sorted(self._members)
        if repeated := len(visible) - len(self.files):
            raise InputError(f"{path}: a name must occur once; got {repeated} that occur again: pack it again")

    def fingerprint(self, names: Sequence[str]) -> str:
        """The SHA-256 of the archive file, in hexadecimal."""
        del names
        return sha256_of(self._reader.path)

    def read(self, name: str) -> bytes:
        """Reads a member and checks it against the checksum of the archive."""
        try:
            return self._reader.read(self._members[name])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise Unreadable(" ".join(str(error).split())) from None


def _all_folders(named: list[tuple[str, zipfile.ZipInfo]]) -> list[str]:
    """All folders: those that are members, and those that only occur in names of members."""
    folders = {name for name, member in named if member.is_dir()}
    for name, _ in named:
        while name := name.rpartition("/")[0]:
            folders.add(name)
    return sorted(folder for folder in folders if folder and not is_hidden(folder))
