"""Shared fixtures: caches for all processes or for one test, one small run, and comparisons of two runs."""

import atexit
import contextlib
import fcntl
import gc
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

# Set before jax is imported; inherited by the workers of pytest-xdist and by processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ev3-distill-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compilation dominates the time of the tests. Without optimization it takes half as long, and half of that without the MLIR
# fusion emitters, whose programs run twice as fast. Examples in the documentation and benchmarks use both. XLA aborts on an
# unknown flag.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1",
    )
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
if "EV3_DISTILL_CACHE" not in os.environ:  # never the user's cache
    os.environ["EV3_DISTILL_CACHE"] = tempfile.mkdtemp(prefix="ev3-distill-cache-")
    atexit.register(shutil.rmtree, os.environ["EV3_DISTILL_CACHE"], ignore_errors=True)

import numpy as np
import pytest

from ev3_distill.cli.main import GC_THRESHOLDS, main
from ev3_distill.data.sources import load_data

gc.set_threshold(*GC_THRESHOLDS)
pytest.register_assert_rewrite(
    "refused_inputs", "report_examples", "teacher_cache_files", "random_walks"
)  # failed assertions there are explained as in tests
SMALL = (
    *("--arms", "ce", "mse", "--student", "mlp:hidden=8", "--budget", "1500"),
    *("--teacher-network", "mlp:hidden=16", "--teacher-budget", "300", "--checkpoint-s", "0"),
)
TIMES = ("wall_s", "compile_s", "earlier_s", "phases")
SHARED = Path(os.environ.get("EV3_DISTILL_DATA", Path(__file__).parents[2] / "shared" / "data"))
if SHARED.is_dir():
    os.environ.setdefault("EV3_DISTILL_DATA", str(SHARED))  # for commands as well


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def fewer_arms(request, monkeypatch):
    """Runs in this process have two default arms, since compiling takes most of a tiny run; not in tests marked `portfolio`.

    Runs in processes of their own, the fixture `finished` and the examples of the documentation have all of them.
    """
    if not request.node.get_closest_marker("portfolio"):
        monkeypatch.setattr("ev3_distill.arms.zoo.DEFAULT", ("kd4", "ce"))


@pytest.fixture
def cli(capsys):
    """Runs a command line in this process; returns its exit code and output."""

    def call(*argv):
        capsys.readouterr()
        code = 0
        try:
            main([str(word) for word in argv])
        except SystemExit as exit_:
            code = exit_.code
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A fresh working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache for this test alone; returns its folder of decoded images."""
    monkeypatch.setenv("EV3_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def small_shards(monkeypatch):
    """Stores of teacher outputs with 16 rows in a shard."""
    monkeypatch.setattr("ev3_distill.teachers.cache.output_store.SHARD_ROWS", 16)


def once(factory, name, make):
    """A folder that all workers of pytest-xdist share; the first one fills it by `make`."""
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    place = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "complete").exists():
            place.mkdir()
            make(place)
            (place / "complete").touch()
    return place


@contextlib.contextmanager
def small_disk(path, size):
    """A small file system of its own, if mounting is permitted.

    It is unmounted lazily: threads of tensorstore may close a file some milliseconds after they have returned.
    """
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs; the test with a limit on file size covers this case")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small finished run of compress. Each worker gets a copy, since one process at a time may work in a run."""
    place = once(tmp_path_factory, "finished", lambda place: main(["compress", *SMALL, "--out", str(place / "run")]))
    return shutil.copytree(place / "run", tmp_path_factory.mktemp("copy") / "run")


@pytest.fixture(scope="session")
def new_digits(tmp_path_factory):
    """A data source: all digits with a little noise, which no run has seen."""
    digits = load_data("digits")
    noise = np.random.default_rng(0).uniform(0, 0.01, digits.inputs.shape).astype(np.float32)
    path = tmp_path_factory.mktemp("new") / "new.npz"
    np.savez(path, inputs=digits.inputs + noise, labels=digits.labels)
    return f"npz:{path}"


@pytest.fixture(scope="session")
def random_logits(tmp_path_factory):
    """A file of logits for digits that are right for half of them: a teacher for tests that do not need a good one."""
    from ev3_distill import load_data

    path = tmp_path_factory.mktemp("logits") / "logits.npz"
    noise = np.random.default_rng(0).normal(size=(1797, 10))
    np.savez(path, logits=(noise + 1.7 * np.eye(10)[load_data("digits").labels]).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def cifar():
    """The first 500 images of a shuffled test set, their labels and the class names."""
    pil = pytest.importorskip("PIL.Image", reason="reads the images")
    path = SHARED / "cifar10_jpeg.zip"
    if not path.is_file():
        pytest.skip(f"the real images are missing: {path.name}")
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if "test/" in name and name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in names})
        selected = [names[i] for i in np.random.default_rng(5).permutation(len(names))[:500]]
        images = np.stack([np.asarray(pil.open(io.BytesIO(archive.read(name)))) for name in selected])
    return images, np.array([classes.index(name.split("/")[-2]) for name in selected]), tuple(classes)


def rows_without_times(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_run(one, other):
    """Asserts that two run directories are bit-identical except for times, and hold no partial files."""
    assert names_in(one) == names_in(other)
    for name in ("config.toml", "given.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert rows_without_times(one / "ledger.jsonl") == rows_without_times(other / "ledger.jsonl")
    reports = [json.loads((run / "report.json").read_text()) for run in (one, other)]
    for report in reports:
        times = {name: report["cost"].pop(name) for name in TIMES if name in report["cost"]}
        assert sum(times["phases"].values()) == pytest.approx(times["wall_s"] - times.get("earlier_s", 0), abs=0.01)
    assert reports[0] == reports[1]
    pages = [
        re.sub(
            r'<tr><th scope="row">of which [a-z ]+</th><td class="number">TIME</td></tr>\n',
            "",
            re.sub(r"\b[\d.]+ (s|min|h)\b( [\d.]+ (s|min)\b)?", "TIME", (run / "report.html").read_text()),
        )
        for run in (one, other)
    ]
    assert pages[0] == pages[1]
    assert newest_digest(one) == newest_digest(other)
    assert variables_of(one) == variables_of(other)
    if (one / "logits.npz").exists():
        with np.load(one / "logits.npz") as of_one, np.load(other / "logits.npz") as of_other:
            assert {n: of_one[n].tobytes() for n in of_one} == {n: of_other[n].tobytes() for n in of_other}
    if (one / "teacher").exists():
        assert_same_run(one / "teacher", other / "teacher")


def names_in(run):
    return sorted(path.name for path in run.iterdir()) + sorted(path.name for path in (run / "student").iterdir())


def newest_digest(run):
    """Number and state digest of the newest checkpoint."""
    newest = max((path for path in (run / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
    return newest.name, json.loads((newest / "digest" / "metadata").read_text())


def variables_of(run):
    """Spec and parameters of a student, as bytes."""
    import jax

    from ev3_distill import students

    network, variables = students.load(run)
    leaves = [(leaf.dtype.str, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(variables)]
    return dict(network.spec), leaves
