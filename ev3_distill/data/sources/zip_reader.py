"""Reads members of a zip archive from several threads.

zipfile.ZipFile.read locks the file and copies through two buffers: 10,000 small images take 1.4 times as long with one
ZipFile for all threads, and 1.8 times as long with one for each, which also reads the archive's directory again. Where the
bytes of a member begin is needed in any case: uncompressed arrays of an npz file are read in place.
"""

import os
import weakref
import zipfile
import zlib
from pathlib import Path

_LOCAL_HEADER = 30  # bytes before the name and the extra field
_ENCRYPTED = 0x1
_UTF8 = 0x800
_UNICODE_PATH = 0x7075  # extra field of Info-ZIP: version, CRC-32 of the name in the header, name in UTF-8


def decode_name(member: zipfile.ZipInfo) -> tuple[str, bool]:
    """The name of a member, and whether its encoding was guessed.

    By the standard (PKWARE APPNOTE, appendix D) a name is in UTF-8 if its flag says so, else in code page 437, which zipfile
    assumes. Many programs write UTF-8 without the flag: macOS does. Bytes of another encoding are hardly ever valid UTF-8.
    """
    if member.flag_bits & _UTF8 or member.orig_filename.isascii():
        return member.filename, False
    raw = member.orig_filename.encode("cp437")
    for content in (_unicode_path(member.extra, raw), raw):
        try:
            if content:
                return content.decode("utf-8"), False
        except UnicodeDecodeError:
            continue
    return member.filename, True


def _unicode_path(extra: bytes, raw: bytes) -> bytes:
    """The name in the extra field for it; empty if there is none, or if it belongs to another name."""
    while len(extra) >= 4:
        kind, size = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        content, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and content[:1] == b"\1" and int.from_bytes(content[1:5], "little") == zlib.crc32(raw):
            return content[5:]
    return b""


class ZipReader:
    """The members of a zip file.

    Attributes:
      path: of the archive.
      zip: the archive as the standard library reads it, for streams; not for several threads.
      members: of the archive.
    """

    def __init__(self, path: Path):
        """Reads the directory of the archive.

        Raises:
          zipfile.BadZipFile: the file is damaged or not a zip file.
        """
        self.path = path
        self.zip = zipfile.ZipFile(path)
        weakref.finalize(self, self.zip.close)
        self.members = self.zip.infolist()
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._file)

    def offset(self, member: zipfile.ZipInfo) -> int:
        """Position in the file at which the (compressed) bytes of a member begin."""
        header = os.pread(self._file, _LOCAL_HEADER, member.header_offset)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("a member is not at the position that the directory names")
        return member.header_offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(
            header[28:30], "little"
        )  # fmt: skip

    def read(self, member: zipfile.ZipInfo) -> bytes:
        """Reads a member and checks its length and checksum.

        Raises:
          zipfile.BadZipFile, zlib.error: the member is damaged or encrypted.
        """
        if member.flag_bits & _ENCRYPTED:
            raise zipfile.BadZipFile("it is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return self.zip.read(member)
        content = os.pread(self._file, member.compress_size, self.offset(member))
        if member.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.file_size + 1)
        if len(content) != member.file_size or zlib.crc32(content) != member.CRC:
            raise zipfile.BadZipFile("its bytes do not match their checksum")
        return content
