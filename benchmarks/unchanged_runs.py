"""Do two checkouts compute the same? `python -m ev3_distill.benchmarks.unchanged_runs OLD_CHECKOUT NEW_CHECKOUT`.

Each checkout makes the same six runs. Their exit codes, their ledgers (times aside) and the variables of the delivered students
must agree bit by bit. If they do not, the first difference is printed and the exit code is 1. Both checkouts run on this
machine, in this Python environment, one after the other, each with its own cache.

This is a check, not a suite of `ev3-distill bench`: it has no rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ev3_distill.benchmarks.datasets import data_folder
from ev3_distill.errors import InputError

COMMAND = "python -m ev3_distill.benchmarks.unchanged_runs"
OUTCOME = "outcome.json"  # exit code and digests of the student, written beside a run's own files
TIMES = ("wall_s", "compile_s")  # the only ledger entries in which equal runs differ
COMPLETE = (0, 3)  # exit codes of a run that came to its end; 3: not certified

# {data} is the data folder.
RUNS: dict[str, str] = {
    "default": "",
    "guards": (
        "--data npz:{data}/mnist.npz --student mlp:hidden=16 --budget 1500 --teacher-network mlp:hidden=64 "
        "--teacher-budget 500 --guard accuracy>=0.9 --guard worst_class_accuracy>=0.8 --guard ece<=0.1"
    ),
    "search": "--sizes mlp:hidden=2 mlp:hidden=4 mlp:hidden=8 --guard accuracy>=0.85 --budget 6000",
    "int8": "--deploy int8 --student mlp:hidden=16 --budget 2000 --teacher-budget 500",
    "folder": (
        "--data folder:{data}/cifar10_jpeg.zip --student resnet:depth=8,width=4 --teacher-network mlp:hidden=32 "
        "--teacher-budget 60 --augment flip,crop=4 --views 2 --budget 60 --batch-size 64"
    ),
    "arms": (
        "--arms kd4 ce es-accuracy --tune temperature mix --student mlp:hidden=8 --budget 1500 --teacher-budget 500"
    ),
}

# Runs in a checkout: prints the SHA-256 of each of a student's arrays by its path.
_DIGESTS = """
import hashlib, json, sys
import jax, numpy as np
import ev3_distill
leaves = jax.tree_util.tree_flatten_with_path(ev3_distill.load_student(sys.argv[1])[1])[0]
def digest(x):
    x = np.asarray(x)
    return hashlib.sha256(f"{x.dtype} {x.shape} ".encode() + x.tobytes()).hexdigest()
print(json.dumps({jax.tree_util.keystr(path): digest(leaf) for path, leaf in leaves}))
"""


def make_runs(checkout: Path, out: Path, names: Sequence[str]) -> None:
    """Makes runs with a checkout.

    Args:
      checkout: a source tree with the package `ev3_distill`.
      out: a folder; each run gets a folder of its name in it, and a log beside that.
      names: keys of RUNS.

    Raises:
      InputError: no such checkout, or a run that did not come to its end.
    """
    if not (checkout / "ev3_distill" / "__init__.py").is_file():
        raise InputError(f"a checkout has the package ev3_distill; {checkout} has none: name its top folder")
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "EV3_DISTILL_CACHE": str(out / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would turn off the convolutions that real runs use
    for name in names:
        began, log = time.monotonic(), out / f"{name}.log"
        options = RUNS[name].format(data=data_folder()).split()
        command = [sys.executable, "-m", "ev3_distill", "compress", *options, "--out", str(out / name)]
        with log.open("wb") as file:
            code = subprocess.run(
                command, cwd=out, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code not in COMPLETE:
            raise InputError(f"a run ends with exit code 0 or 3; {name} of {checkout} ended with {code}: see {log}")
        student = subprocess.run(
            [sys.executable, "-c", _DIGESTS, str(out / name)],
            cwd=out,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
        )
        outcome = {"exit_code": code, "student": json.loads(student.stdout)}
        (out / name / OUTCOME).write_text(json.dumps(outcome))
        print(f"{checkout}: {name}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def differences(before: Path, after: Path) -> Iterator[str]:
    """What differs between two folders that `make_runs` wrote, in the order of the runs.

    Args:
      before: one folder.
      after: the other.

    Raises:
      InputError: a folder holds no complete run.
    """
    names = [_run_names(side) for side in (before, after)]
    for name in dict.fromkeys([*names[0], *names[1]]):
        if name not in names[0] or name not in names[1]:
            yield f"{name}: only in {before if name in names[0] else after}"
            continue
        one, other = before / name, after / name
        outcomes = [json.loads((side / OUTCOME).read_text()) for side in (one, other)]
        yield from _entries(f"{name}: exit code", *({"": outcome["exit_code"]} for outcome in outcomes))
        yield from _ledger_differences(name, one, other)
        yield from _entries(f"{name}: student", *(outcome["student"] for outcome in outcomes))


def _run_names(folder: Path) -> list[str]:
    names = sorted(path.parent.name for path in folder.glob(f"*/{OUTCOME}"))
    if not names:
        raise InputError(f"a folder of runs has {OUTCOME} in each of them; {folder} has none: make the runs again")
    return names


def _ledger_differences(name: str, one: Path, other: Path) -> Iterator[str]:
    """Of every ledger of a run: a search has one for each size."""
    paths = [{path.relative_to(side).as_posix() for path in side.rglob("ledger.jsonl")} for side in (one, other)]
    for path in sorted(paths[0] | paths[1]):
        if path not in paths[0] or path not in paths[1]:
            yield f"{name}: {path} is only in {one if path in paths[0] else other}"
            continue
        rows = [[json.loads(line) for line in (side / path).read_text().splitlines()] for side in (one, other)]
        for number, (row, counterpart) in enumerate(zip(*rows, strict=False), 1):
            timeless = ({key: x for key, x in side.items() if key not in TIMES} for side in (row, counterpart))
            yield from _entries(f"{name}: {path}, row {number}", *timeless)
        if len(rows[0]) != len(rows[1]):
            yield f"{name}: {path} has {len(rows[0])} rows before and {len(rows[1])} after"


def _entries(where: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*one, *other]):
        values = [json.dumps(side[key]) if key in side else "nothing" for side in (one, other)]
        if values[0] != values[1]:
            yield f"{where}{', ' + key if key else ''}: {values[0]} before, {values[1]} after"


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the runs with both checkouts and compares them: exit code 1 if they differ, 2 for bad input."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, help="a checkout, or with --compare-only a folder of its runs")
    parser.add_argument("new", type=Path, help="the other")
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS], help="make these runs only")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder, in `old` and `new`")
    parser.add_argument("--compare-only", action="store_true", help="compare two folders of runs; make none")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            sides = [options.old, options.new]
            if not options.compare_only:
                out = (options.out or Path(temporary)).resolve()
                for checkout, name in ((options.old, "old"), (options.new, "new")):
                    make_runs(checkout, out / name, options.only)
                sides = [out / "old", out / "new"]
            first = next(differences(*sides), None)
    except InputError as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        return 2
    print("the runs are the same" if first is None else f"the runs differ: {first}")
    return int(first is not None)


if __name__ == "__main__":
    raise SystemExit(main())
