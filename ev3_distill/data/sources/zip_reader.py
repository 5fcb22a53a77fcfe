"""A zip archive that threads read together: each member by its place in the file."""

import os
import weakref
import zipfile
import zlib
from pathlib import Path

_LOCAL_HEADER = 30  # bytes, before the name and the extra field
_ENCRYPTED = 0x1


class Archive:
    """The members of a zip file."""

    def __init__(self, path: Path):
        """Reads the archive's directory.

        Raises:
          zipfile.BadZipFile: it is none, or damaged.
        """
        self.path = path
        self.zip = zipfile.ZipFile(path)
        weakref.finalize(self, self.zip.close)
        self.members = self.zip.infolist()
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._file)

    def offset(self, member: zipfile.ZipInfo) -> int:
        """Where in the file a member's (compressed) bytes begin."""
        header = os.pread(self._file, _LOCAL_HEADER, member.header_offset)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("a member is not where the directory says")
        return member.header_offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(
            header[28:30], "little"
        )  # fmt: skip

    def content(self, member: zipfile.ZipInfo) -> bytes:
        """A member's bytes, checked.

        Raises:
          zipfile.BadZipFile, zlib.error: it is damaged or encrypted.
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
