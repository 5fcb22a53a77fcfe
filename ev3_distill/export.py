"""Export: a student out of a finished run, in a folder of its own with the evidence that speaks for it."""

import dataclasses
import os
import shutil
from pathlib import Path

from ev3_distill.archive import FILE, Archive, pick
from ev3_distill.errors import InputError
from ev3_distill.run import read_json, write_json

EVIDENCE = "evidence.json"


def export(run: Path, out: Path, conditions: str = "") -> list[str]:
    """Copies a student to a new folder, which appears whole or not at all.

    Args:
      run: directory of a finished run.
      out: the folder: spec.json, variables/, and evidence.json, the certificate or what decide showed.
      conditions: which student of a search, see `archive.pick`; the delivered one where there are none.

    Returns:
      Lines that tell what was exported.

    Raises:
      InputError: a run that is not finished or has no such student, or a folder that is there.
    """
    if not (run / "report.json").exists():
        raise InputError(f"export needs a finished run; {run} has no report.json: finish it by --resume")
    if out.exists():
        raise InputError(f"export writes a new folder; {out} is there: choose another --out")
    finished = read_json(run / "report.json")
    folder, evidence = run / "student", {"certificate": finished["certificate"], "guards": finished["guards"]}
    told = f"the student that {run} delivered, {finished['student']['params']:,} parameters"
    if conditions:
        if not (run / FILE).exists():
            raise InputError(f"a pick is among the students of a search; {run} made one alone: leave out --pick")
        entry = pick(Archive(run, confidence=finished["certificate"]["confidence"]).entries, conditions)
        told = f"student {entry.number}, {entry.network}, {entry.params:,} parameters: {entry.accuracy:.1%} on decide"
        if entry.number != finished["search"]["delivered"]:
            folder, evidence = run / "sizes" / f"{entry.number:02d}" / "student", {"decide": dataclasses.asdict(entry)}
            told += ", which chose among several; no certificate is about it: run evaluate on data that are new to it"
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, temporary)
        write_json(temporary / EVIDENCE, evidence)
        os.replace(temporary, out)
    except OSError as error:
        raise InputError(f"export needs a folder that it can write; got {out} ({error}): choose another") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [f"Exported {told}.", f"Student: {out}"]
