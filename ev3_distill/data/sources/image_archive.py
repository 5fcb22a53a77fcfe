"""Where the files of an image folder are: in a directory, or in a zip archive, which is read without extracting it."""

import errno
import hashlib
import itertools
import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from ev3_distill.data.sources.folder_entries import HEAD, Entries, kind_of
from ev3_distill.data.sources.unreadable import Unreadable
from ev3_distill.data.sources.zip_reader import ZipReader, decode_name
from ev3_distill.errors import InputError
from ev3_distill.runtime.files import sha256_of

_SPAN = 256  # files per task of a thread


class Container(Protocol):
    """Files by name, with / between the names of folders."""

    files: list[str]
    folders: list[str]
    recoded: bool  # whether names differ from those that zipfile reads
    guessed: list[str]  # names whose encoding is unknown

    entries: Entries

    def fingerprint(self, names: Sequence[str]) -> str:
        """The SHA-256, in hexadecimal, of these files or of a superset."""

    def head(self, name: str) -> bytes:
        """The first bytes of a file, to recognize images by; empty if it cannot be read."""

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
    got = "is neither" if path.exists() else "does not exist"
    raise InputError(f"folder:DIR needs a directory or a zip file; got {path}, which {got}: check the path")


def _open_directory(path: Path) -> "DirectoryContainer":
    try:
        return DirectoryContainer(path)
    except OSError as error:
        raise InputError(
            f"folder:DIR needs permission to read its content; got {error.filename} ({error.strerror}): change its "
            "permissions"
        ) from None


class DirectoryContainer:
    """A directory with everything below it, except hidden files and folders.

    Links are followed, as if what they name were copied here. Special files, which could block a reader, are left out.
    """

    recoded = False

    def __init__(self, root: Path):
        self.root = root
        self.guessed: list[str] = []
        self.files: list[str] = []
        self.folders: list[str] = []
        self.entries = Entries([], [], [])
        self._digests: dict[str, bytes] = {}
        self._inodes: set[tuple[int, int]] = set()
        self._list("", ())

    def _list(self, folder: str, ancestors: tuple[tuple[int, int], ...]) -> None:
        status = os.stat(self.root / folder)
        if (status.st_dev, status.st_ino) in ancestors:
            name = folder.rstrip("/")
            self.entries.links[:] = [link for link in self.entries.links if link != name]
            self.entries.left_out.append((name, "link to a folder around it"))
            return
        ancestors = (*ancestors, (status.st_dev, status.st_ino))
        with os.scandir(self.root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{folder}{entry.name}"
                if is_hidden(entry.name):
                    continue
                try:
                    mode = entry.stat().st_mode if entry.is_symlink() or not entry.is_dir() else stat.S_IFDIR
                except OSError as error:
                    if not entry.is_symlink() or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise
                    self.entries.left_out.append((name, "link to nothing"))
                    continue
                self._add(name, mode, entry, ancestors)

    def _add(self, name: str, mode: int, entry: "os.DirEntry[str]", ancestors: tuple[tuple[int, int], ...]) -> None:
        """Adds an entry and, if it is a folder, everything below it."""
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            self.entries.left_out.append((name, kind_of(mode)))
            return
        if entry.is_symlink():
            self.entries.links.append(name)
        if stat.S_ISDIR(mode):
            self.folders.append(name)
            self._list(f"{name}/", ancestors)
            return
        self.files.append(name)
        inode = (entry.stat().st_dev, entry.stat().st_ino)
        if inode in self._inodes:
            self.entries.repeated.append(name)
        self._inodes.add(inode)

    def head(self, name: str) -> bytes:
        """The first bytes of a file, to recognize images by; empty if it cannot be read."""
        try:
            with open(f"{self.root}/{name}", "rb", buffering=0) as file:
                return file.read(HEAD)
        except OSError:
            return b""

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
        decoded = [(*decode_name(member), member) for member in self._reader.members]
        self.recoded = any(name != member.filename for name, _, member in decoded)
        self.guessed = [name for name, guessed, _ in decoded if guessed]
        named = [(name.replace("\\", "/").strip("/"), member) for name, _, member in decoded]
        self.folders = _all_folders(named)
        files = [(name, member) for name, member in named if not member.is_dir() and not is_hidden(name)]
        links = [(name, "symbolic link") for name, member in files if _is_link(member)]
        self.entries = Entries([], [], links)
        visible = [(name, member) for name, member in files if not _is_link(member)]
        self._members = dict(visible)
        self.files = sorted(self._members)
        if repeated := len(visible) - len(self.files):
            raise InputError(f"{path}: a name must occur once; got {repeated} that occur again: pack it again")

    def fingerprint(self, names: Sequence[str]) -> str:
        """The SHA-256 of the archive file, in hexadecimal."""
        del names
        return sha256_of(self._reader.path)

    def head(self, name: str) -> bytes:
        """The first bytes of a file, to recognize images by; empty if it cannot be read."""
        try:
            with self._reader.zip.open(self._members[name]) as file:
                return file.read(HEAD)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError):
            return b""

    def read(self, name: str) -> bytes:
        """Reads a member and checks it against the checksum of the archive."""
        try:
            return self._reader.read(self._members[name])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise Unreadable(" ".join(str(error).split())) from None


def _is_link(member: zipfile.ZipInfo) -> bool:
    """Whether a member holds the name of another file instead of content, as `zip --symlinks` stores it."""
    return stat.S_ISLNK(member.external_attr >> 16)


def _all_folders(named: list[tuple[str, zipfile.ZipInfo]]) -> list[str]:
    """All folders: those that are members, and those that only occur in names of members."""
    folders = {name for name, member in named if member.is_dir()}
    for name, _ in named:
        while name := name.rpartition("/")[0]:
            folders.add(name)
    return sorted(folder for folder in folders if folder and not is_hidden(folder))
