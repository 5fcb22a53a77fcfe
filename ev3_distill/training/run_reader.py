"""Reads runs: their report, their configuration and their data."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ev3_distill import config as configs
from ev3_distill.config_file import read_finished_config
from ev3_distill.data.group_file import with_groups
from ev3_distill.data.sources import Dataset, load_data
from ev3_distill.errors import InputError, warn
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.runtime.progress import CountProgress
from ev3_distill.training.memory import dataset_limit, memory_limit
from ev3_distill.training.run_dir import read_json


def report_in(directory: Path) -> dict[str, Any] | None:
    """The report of a run, or None if the run is unfinished."""
    path = directory / "report.json"
    return read_json(path) if path.exists() else None


def trained_seconds(directory: Path) -> float:
    """Seconds of training in a run so far: of its student or of all stages of its search, its teacher and its control."""
    stages = sorted(directory.glob("sizes/*/ledger.jsonl")) or [directory / "ledger.jsonl"]
    ledgers = [*stages, directory / "teacher" / "ledger.jsonl", directory / "control" / "ledger.jsonl"]
    return sum(_last_time(ledger) for ledger in ledgers)


def _last_time(ledger: Path) -> float:
    """The time in the last row of a ledger, which may end in a row that was not written to its end."""
    latest = 0.0
    with contextlib.suppress(ValueError):
        for row in read_rows(ledger):
            latest = max(latest, row["wall_s"])
    return latest


def certificate_in(directory: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """The content of certificate.json of a finished run.

    Args:
      directory: of the run.
      report: its report.

    Raises:
      InputError: certificate.json is missing, damaged, or of another run than the report.
    """
    certificate = read_json(directory / "certificate.json")
    for name in ("confidence", "claims"):
        if json.dumps(certificate.get(name)) != json.dumps(report["certificate"][name]):
            raise InputError(
                f"certificate.json and report.json of a run must say the same; those in {directory} differ in {name}: restore "
                "both from a copy, or name another run"
            )
    return certificate


def config_of(directory: Path, report: dict[str, Any]) -> configs.Compress | configs.Teach:
    """The configuration of the run with this report."""
    is_teacher = report["teacher"]["source"] == "labels"
    kind: type[configs.Compress | configs.Teach] = configs.Teach if is_teacher else configs.Compress
    return read_finished_config(kind, directory)


def data_of(config: configs.RunConfig, source: str = "", *, offset: Sequence[float] | None = None) -> Dataset:
    """The data of a run, or another source read with the options of that run.

    Args:
      config: of the run.
      source: the other source.
      offset: of the run's data, `offset_in` its report; None: of a run that starts.
    """
    with CountProgress("images", things="images") as progress:
        dataset = load_data(
            source or config.data,
            memory=dataset_limit(memory_limit(config.memory)),
            skip_corrupt=config.skip_corrupt,
            stored_pixels=config.stored_pixels,
            offset=offset,
            warn=warn,
            progress=progress.update,
        )
    return with_groups(dataset, config.groups) if config.groups and source in ("", config.data) else dataset


def offset_in(facts: Mapping[str, Any]) -> Sequence[float]:
    """What was subtracted from the columns of a run's data, from `data` of report.json or model.json; empty: nothing."""
    return [float(number) for number in facts.get("offset", ())]


def check_joint_strata(directory: Path, config: configs.RunConfig, *, resume: bool) -> None:
    """Warns if an unfinished run of an older version continues with its splits.

    Raises:
      InputError: a new run would be divided as in older versions.
    """
    if config.joint_strata and not resume:
        raise InputError("joint_strata is how older versions divided data; got true for a new run: remove it")
    if config.joint_strata and report_in(directory) is None:
        warn(
            f"{directory} was started by an older version, whose sealed split has the class counts of explore: its "
            "certificate may promise too much, most of all with many classes; prefer a new run"
        )
