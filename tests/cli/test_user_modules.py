"""A user's own `teachers.py`, `students/`, `benchmarks.py` and `config.py` work beside ours, from every entry point."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("teachers", "students", "benchmarks")  # top-level folders of the repository, installed below ev3_distill
FILES = {
    "teachers.py": """
        import numpy as np

        def logits(inputs):
            return 4 * np.stack([inputs[:, 0], -inputs[:, 0]], axis=1)
        """,
    "students/__init__.py": """
        from flax import nnx

        def make(input_shape, num_classes, rngs):
            return nnx.Linear(input_shape[0], num_classes, rngs=rngs)
        """,
    "benchmarks.py": """
        def right(logits, labels):
            return (logits.argmax(axis=1) == labels) * 1.0
        """,
    "config.py": "raise RuntimeError('the config.py of the user was imported')",
}
SCRIPT = "from ev3_distill.cli.main import main\n\nmain()\n"  # what pip installs as the console script
GUARD = "benchmarks:right >= 0.01"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder, with data, and a console script outside it."""
    place = tmp_path_factory.mktemp("user")
    home = place / "home"
    for name, source in FILES.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("\n".join(line[8:] if line.startswith(" ") else line for line in source.splitlines()))
    inputs = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    np.savez(home / "data.npz", inputs=inputs, labels=(inputs[:, 0] < 0).astype(np.int32))
    (place / "bin").mkdir()
    (place / "bin" / "ev3-distill").write_text(SCRIPT)
    return home


def python(folder, *argv):
    """Runs Python in the user's folder. As in an installation, `ev3_distill` is all of ours that can be imported."""
    site = folder.parent / "site"
    if not site.exists():
        site.mkdir()
        (site / "ev3_distill").symlink_to(ROOT / "ev3_distill")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


ENTRY_POINTS = {"console script": ["../bin/ev3-distill"], "python -m": ["-m", "ev3_distill"]}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_the_command_line_uses_modules_of_the_user_where_named_and_ours_elsewhere(folder, entry):
    command, run = ENTRY_POINTS[entry], f"run-{entry[0]}"
    code, out, err = python(
        folder,
        *command,
        *("compress", "--data", "npz:data.npz", "--teacher", "python:teachers:logits", "--student", "students:make"),
        *("--guard", GUARD, "--arms", "mse", "--budget", "300", "--out", run),
    )
    assert code == 0, err
    assert "python:teachers:logits: accuracy 100.0%" in err + out
    assert f"Guard {GUARD}: certified" in out
    code, out, err = python(folder, *command, "evaluate", run, "--student", "students:make", "--guard", GUARD)
    assert code == 0, err
    assert f"Guard {GUARD}: certified" in out


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_bench_lists_our_benchmarks(folder, entry):
    code, _, err = python(folder, *ENTRY_POINTS[entry], "bench", "no-such")
    assert code == 2
    assert "hypergrad" in err
    assert "Traceback" not in err


def test_the_python_api_and_the_modules_of_the_user_live_in_one_process(folder):
    code, out, err = python(
        folder,
        "-c",
        """
import numpy as np
import benchmarks, students, teachers
import ev3_distill
import ev3_distill.benchmarks, ev3_distill.config, ev3_distill.students, ev3_distill.teachers
from ev3_distill.teachers import load_teacher

for mine, theirs in ((benchmarks, ev3_distill.benchmarks), (students, ev3_distill.students), (teachers, ev3_distill.teachers)):
    assert mine is not theirs and mine.__file__.startswith(__import__("os").getcwd())
data = ev3_distill.load_data("npz:data.npz")
teacher = load_teacher("python:teachers:logits", input_shape=(4,), num_classes=2, class_names=data.class_names)
assert (teacher.outputs(data.inputs)["logits"] == teachers.logits(data.inputs)).all()
network = ev3_distill.students.from_name("students:make", (4,), 2)
print(network.spec["factory"], teacher.source)
""",
    )
    assert code == 0, err
    assert out.split() == ["students:make", "python:teachers:logits"]


def test_a_file_hidden_by_an_installed_module_is_reported(folder):
    (folder.parent / "hidden").mkdir()
    (folder.parent / "hidden" / "types.py").write_text("def make(input_shape, num_classes, rngs): ...")
    code, _, err = python(folder.parent / "hidden", *ENTRY_POINTS["console script"], "compress", "--student=types:make")
    assert code == 2
    assert "types.py is hidden by another module" in err
    assert "rename your file" in err


def test_no_module_of_ours_is_imported_from_the_top_level():
    """Such an import would find the user's module of that name, or none."""
    names = {*FOLDERS, *(path.stem for path in (ROOT / "ev3_distill").glob("*") if path.name != "types.py")}
    for folder in (ROOT / "ev3_distill", *(ROOT / name for name in FOLDERS)):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not names & {module.split(".")[0] for module in modules}, (path, modules)


def test_the_installed_package_has_one_name_at_top_level():
    """What `pip show -f ev3-distill` lists, where it is installed from a wheel."""
    records = [found for found in metadata.distributions(name="ev3-distill") if found.read_text("RECORD")]
    names = {path.parts[0] for found in records for path in found.files if path.parts[0] != ".."}
    if not names or any(name.startswith("__editable__") for name in names):
        pytest.skip("ev3-distill is not installed from a wheel here")
    assert {name for name in names if not name.endswith(".dist-info")} == {"ev3_distill"}


def test_a_wheel_installs_one_name_at_top_level(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs setuptools 77 to build")
    for name in ("ev3_distill", *FOLDERS):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("results", "__pycache__", ".*"),
        )
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"ev3_distill"}
    for module in (*FOLDERS, "teachers/kinds", "students/families"):
        assert f"ev3_distill/{module}/__init__.py" in files
    for data in ("py.typed", "benchmarks/page.html.j2", "data/sources/digits.npz", "monitor/report.html.j2"):
        assert f"ev3_distill/{data}" in files
