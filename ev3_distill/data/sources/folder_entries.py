"""What a folder of images holds besides plain files: links, special files, and images that are not read."""

import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
_IMAGE_SUFFIXES = (
    *(".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga", ".ico", ".psd", ".svg", ".eps", ".pcx", ".xbm", ".exr", ".hdr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raw", ".dcm", ".fits", ".nii", ".qoi", ".dds"),
)
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"8BPS", b"v/1\x01")
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # of ISO base media files
_LOOKED_INTO = 200  # files
HEAD = 16
"""Bytes from which an image is recognized."""


class Entries(NamedTuple):
    """Entries of a folder that are not plain files."""

    links: list[str]  # that were followed, to files and folders
    repeated: list[str]  # files that are another listed file too, by a link
    left_out: list[tuple[str, str]]  # name and kind


def kind_of(mode: int) -> str:
    """What a special file is, from its mode."""
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def warn_of_entries(entries: Entries, place: str, warn: Callable[[str], None]) -> None:
    """Warns of special files, which were left out, and of links, which were followed.

    Args:
      entries: of the folder.
      place: of the folder, for messages.
      warn: called with each warning.
    """
    if entries.left_out:
        name, kind = entries.left_out[0]
        warn(f"{place}: left out {len(entries.left_out)} entries that are not files, such as {_quoted(name)} ({kind})")
    if entries.links:
        again = (
            f"; {len(entries.repeated)} files occur more than once by a link, such as {_quoted(entries.repeated[0])}, and "
            "an example on two sides of a split proves nothing"
            if entries.repeated
            else ""
        )
        warn(f"{place}: followed {len(entries.links)} symbolic links, such as {_quoted(entries.links[0])}{again}")


def unread_images(names: Sequence[str], head: Callable[[str], bytes]) -> list[str]:
    """Files that are images, by their suffix or first bytes, although their suffix is none of those that are read.

    Args:
      names: of files that are ignored; the first few are looked into.
      head: the first `HEAD` bytes of a file; empty if it cannot be read.
    """
    by_suffix = [name for name in names if name.lower().endswith(_IMAGE_SUFFIXES)]
    others = [name for name in names if name not in set(by_suffix)][:_LOOKED_INTO]
    return sorted([*by_suffix, *(name for name in others if _starts_like_image(head(name)))])


def _starts_like_image(start: bytes) -> bool:
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    is_heif = start[4:8] == b"ftyp" and start[8:12] in _BRANDS
    return start.startswith(_STARTS) or is_webp or is_heif


def _quoted(name: str) -> str:
    return name if name.isprintable() else ascii(name)
