"""Digests that say which student a folder holds: written with it, and compared at each load.

`digest.json` beside `spec.json` has a SHA-256 of the spec, one of the variables and one of each file that stores them, so that
no change goes unnoticed. The files are compared first, because readers of damaged checkpoints fail in many ways. Other files
may say which student a folder must hold: `certificate.json` of its run, `archive.json` of a search, `model.json` of an export.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.files import sha256_of
from ev3_distill.types import Variables

FILE = "digest.json"
SPEC, VARIABLES, FILES = "spec", "variables", "files"


class _Record(NamedTuple):
    """What a file says of the student in a folder."""

    file: Path
    digests: dict[str, str | None]  # of SPEC and VARIABLES; None: not recorded


def spec_digest(spec: Mapping[str, Any]) -> str:
    """The SHA-256 of a spec as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(spec)), sort_keys=True).encode()).hexdigest()


def write(folder: Path, spec: Mapping[str, Any], variables: Variables) -> None:
    """Writes digest.json of a student into its folder, which holds its variables already."""
    stored = sorted(path for path in (folder / VARIABLES).rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in stored}
    content = {SPEC: spec_digest(spec), VARIABLES: tree_digest(variables), FILES: files}
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")


def check_spec(folder: Path, spec: Mapping[str, Any]) -> None:
    """Raises InputError if a record says that the folder must hold a student of another spec."""
    _check(folder, SPEC, spec_digest(spec))


def check_files(folder: Path) -> None:
    """Raises InputError if a file of the variables is missing or has changed since it was written."""
    if (content := _read(folder / FILE)) is None:  # saved by an older version
        return
    for name, digest in _required(content, FILES, folder / FILE).items():
        file = folder / name
        if not file.is_file() or sha256_of(file) != digest:
            fault = "was changed or damaged" if file.exists() else "is missing"
            raise InputError(
                f"a saved student must stay as it was written; {file} {fault}: restore the folder from a copy, or train again"
            )


def check_variables(folder: Path, variables: Any) -> None:
    """Raises InputError if a record says that the folder must hold other variables."""
    _check(folder, VARIABLES, tree_digest(variables))


def _check(folder: Path, part: str, found: str) -> None:
    """Compares the digest of one part of a student with every record of it."""
    for file, digests in _records(folder.resolve()):
        expected = digests[part]
        if expected in (None, found):
            continue
        if file.name == FILE:
            raise InputError(
                f"a saved student must stay as it was written; {folder} holds another {part} than its {FILE} says: restore the "
                "folder from a copy, or train again"
            )
        raise InputError(
            f"what ships must be what was tested; {folder} has {part} {found[:12]}, and {file} is about {str(expected)[:12]}: "
            "restore that student, or move this one out of the folder"
        )


def _records(folder: Path) -> Iterator[_Record]:
    """Every record of the student that a folder must hold; the path is absolute."""
    if (content := _read(folder / FILE)) is not None:
        yield _Record(folder / FILE, {part: _required(content, part, folder / FILE) for part in (SPEC, VARIABLES)})
    file = folder / "model.json"
    if (content := _read(file)) is not None:
        yield _Record(file, {SPEC: None, VARIABLES: _required(content, "student", file)})
    if folder.name != "student":
        return
    file = folder.parent / "certificate.json"
    if (content := _read(file)) is not None:
        yield _Record(file, {SPEC: content.get("spec"), VARIABLES: content.get("student")})
    file, number = folder.parents[2] / "archive.json", folder.parent.name
    if folder.parents[1].name == "sizes" and (content := _read(file)) is not None:
        for entry in _required(content, "entries", file):
            if f"{entry['number']:02d}" == number:
                yield _Record(file, {SPEC: spec_digest(entry["spec"]), VARIABLES: entry["digest"]})


def _read(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None where there is none."""
    if not file.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"the files that say which student a folder holds must be readable; {file} is damaged ({summary(error)}): restore "
            "it from a copy"
        ) from None
    return content


def _required(content: Any, name: str, file: Path) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise InputError(
            f"the files that say which student a folder holds must be complete; {file} lacks {name}: restore it from a copy"
        )
    return content[name]
