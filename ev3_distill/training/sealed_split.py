"""The sealed split's openings, on record before anybody looks.

opened.json of a run: {"openings": [{"student", "time", "confidence", "claims", "costs"}]}, the run's own opening first; one
with `others` is for these students, too, any of which may then be delivered. A run that is killed while it scores its students
finishes the same opening when it is resumed; whatever would be another one must say so.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ev3_distill.errors import InputError
from ev3_distill.training.run_dir import read_json, write_json

NAME = "opened.json"


def openings(directory: Path) -> list[dict[str, Any]]:
    """All openings of a run's sealed split so far.

    Raises:
      InputError: the record is damaged.
    """
    if not (directory / NAME).exists():
        return []
    told: list[dict[str, Any]] = read_json(directory / NAME)["openings"]
    return told


def candidates_of(opening: dict[str, Any]) -> list[str]:
    """The students that a split was opened for."""
    return [opening["student"], *opening.get("others", [])]


def open_split(
    directory: Path,
    student: str,
    claims: Sequence[str],
    *,
    confidence: float,
    costs: str | None = None,
    reopen: bool = False,
    others: Sequence[str] = (),
) -> int:
    """Opens the sealed split of a run for one student, or a few, and a family of claims that is now fixed.

    The opening is on disk when this returns. One that is on record already goes on, and is no further one.

    Args:
      directory: of the run.
      student: its digest.
      claims: metrics that will be claimed.
      confidence: of the certificate.
      costs: digest of the table of costs, for a claim on them.
      reopen: open a split again that was opened for other claims.
      others: digests of those that may be delivered in its place.

    Returns:
      How many openings came before it.

    Raises:
      InputError: the split was opened for another student, or for other claims and is not to be reopened.
    """
    told = openings(directory)
    family = {"confidence": confidence, "claims": list(claims), "costs": costs}
    ours = bool(told) and {student, *others} <= set(candidates_of(told[0]))
    for i, other in enumerate(told):
        if ours and {name: other[name] for name in family} == family:
            return i
    if told and not ours:
        raise InputError(
            f"a sealed split certifies those that it was opened for; that of {directory} was opened for "
            f"{' and '.join(name[:12] for name in candidates_of(told[0]))} and is asked about {student[:12]}: start anew with "
            "--out, or score other data by --data"
        )
    if told and not reopen:
        first = told[0]
        raise InputError(
            f"a sealed split is opened once; that of {directory} was, on {first['time']}, for {', '.join(first['claims'])} at "
            f"{first['confidence']:.10g}, and is asked for {', '.join(claims)} at {confidence:.10g}: score other data by "
            "--data, or give --reopen, and the bounds are corrected for it"
        )
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    row = {"student": student, **family, **({"others": list(others)} if others else {})}
    write_json(directory / NAME, {"openings": [*told, {**row, "time": moment}]})
    _sync(directory)
    return len(told)


def _sync(directory: Path) -> None:
    """Brings the names of a directory to the disk, as `write_json` does the content of its files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
