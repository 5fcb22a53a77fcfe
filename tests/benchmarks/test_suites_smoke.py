"""Benchmarks run at their smallest size by the command line, and continue where they stopped: `pytest -m slow`."""

import json

import pytest
from conftest import SHARED

from ev3_distill import benchmarks
from ev3_distill.cli.main import main

# What no other test runs, the longest first; but pytorch and int8, whose smallest size takes pretrained files or PyTorch.
SMOKED = ["speed", "search", "memory", "safety", "hypergrad", "protonet", "evolution", "growth", "rescue", "robustness",
          "rotation", "guards", "tuning", "scaling"]  # fmt: skip
NEEDS = {"rotation": "mnist.npz", "protonet": "omniglot_images_background.zip"}


@pytest.mark.slow
@pytest.mark.parametrize("suite", SMOKED)
def test_smoke(suite, tmp_path, capfd):
    if suite in NEEDS and not (SHARED / NEEDS[suite]).is_file():
        pytest.skip(f"the real data are not there: {NEEDS[suite]}")
    command = ["bench", suite, "--seeds", "1", "--size", "smoke", "--out", str(tmp_path)]
    main(command)
    head, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    key = benchmarks.SUITES[suite].KEY
    assert head["suite"] == suite and len({tuple(row[field] for field in key) for row in rows}) == len(rows) > 0
    assert capfd.readouterr().out.endswith((tmp_path / "table.md").read_text())
    assert (tmp_path / "report.html").stat().st_size > 1000
    main(command)  # measures nothing
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1 + len(rows)
