"""A finished run: what it reported, how it was configured, and the data it was about."""

from pathlib import Path
from typing import Any

from ev3_distill import config
from ev3_distill.config_file import read_config
from ev3_distill.data.sources import Dataset, load_data
from ev3_distill.errors import warn
from ev3_distill.monitor import report
from ev3_distill.runtime.progress import CountProgress
from ev3_distill.training.run_dir import read_json
from ev3_distill.training.setup import limit_of, share_of


def report_in(directory: Path) -> dict[str, Any] | None:
    """The report of a run that has one; its page is rendered where a kill came between the two."""
    if not (directory / "report.json").exists():
        return None
    finished = read_json(directory / "report.json")
    if not (directory / "report.html").exists():
        report.write_html(directory)
    return finished


def config_of(directory: Path, finished: dict[str, Any]) -> config.Compress | config.Teach:
    """How a run that reported this was configured."""
    is_teacher = finished["teacher"]["source"] == "labels"
    kind: type[config.Compress | config.Teach] = config.Teach if is_teacher else config.Compress
    return read_config(kind, directory / "config.toml")


def data_of(chosen: config.RunConfig, source: str = "") -> Dataset:
    """The data of a run, or another source as that run would read it."""
    with CountProgress("images", things="images") as progress:
        return load_data(
            source or chosen.data,
            memory=share_of(limit_of(chosen.memory)),
            skip_corrupt=chosen.skip_corrupt,
            warn=warn,
            progress=progress.update,
        )
