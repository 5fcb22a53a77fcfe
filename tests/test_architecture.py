"""The house's walls: who may import whom, what waits until it is used, and names and docstrings."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ev3_distill", "teachers", "students", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = (
    *("clu", "torch", "onnx", "onnxruntime", "skops", "tensorflow", "tensorflow_datasets", "jax2onnx"),
    *("matplotlib", "PIL", "grain"),
)


@functools.cache
def name_of(path):
    """The dotted name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def inside(name, room):
    """Whether a dotted name is a room or within it."""
    return name == room or name.startswith(room + ".")


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def names_in(node, here):
    """What an import imports, as dotted names; those from packages of ours to the module they are in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = here.split(".") if MODULES[here].name == "__init__.py" else here.split(".")[:-1]
            base = ".".join(filter(None, [*package[: len(package) - node.level + 1], base]))
        return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
    called = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
    if called and node.args and isinstance(node.args[0], ast.Constant):
        return [node.args[0].value]
    return []


def imports(module, *, at_start=False, source=None):
    """Names that a module imports anywhere or, `at_start`, when it is imported itself; not for type checking alone."""
    found = set()

    def visit(node):
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        found.update(names_in(node, module))
        children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
        for child in children:
            visit(child)

    visit(ast.parse(MODULES[module].read_text() if source is None else source))
    return found


def allowed(name, rooms):
    top = name.split(".")[0]
    return top in sys.stdlib_module_names or any(inside(name, room) for room in rooms)


def members(*rooms):
    return [name for name in MODULES if any(inside(name, room) for room in rooms)]


def test_the_imports_are_read_right():
    source = """
import a.b, torch
from ev3_distill.data import splits
from ev3_distill import errors as e
from ev3_distill.core.step import make_step
if TYPE_CHECKING:
    import matplotlib
else:
    import d
def f():
    import c
    importlib.import_module("students")
class C:
    import g
"""
    ours = {"ev3_distill.data.splits", "ev3_distill.errors", "ev3_distill.core.step"}
    assert imports("ev3_distill.cli.main", source=source) == ours | {"a.b", "torch", "c", "d", "g", "students"}
    assert imports("ev3_distill.cli.main", source=source, at_start=True) == ours | {"a.b", "torch", "d", "g"}
    assert imports("ev3_distill.core.step", source="from . import adapt") == {"ev3_distill.core.adapt"}
    assert imports("ev3_distill.core", source="from .step import x") == {"ev3_distill.core.step"}
    assert imports("ev3_distill.core.step", source="from ..types import x") == {"ev3_distill.types"}
    assert inside("ev3_distill.core.step", "ev3_distill.core")
    assert not inside("ev3_distill.core_of", "ev3_distill.core")


def test_types_imports_jax_alone():
    assert [name for name in imports("ev3_distill.types") if not allowed(name, ["jax"])] == []


CORE_MAY = ["ev3_distill.types", "ev3_distill.config", "ev3_distill.core", "jax", "optax"]


@pytest.mark.parametrize("module", members("ev3_distill.core"))
def test_the_core_knows_no_arm_loss_or_network(module):
    assert [name for name in imports(module) if not allowed(name, CORE_MAY)] == []


HELPERS = members(*(f"ev3_distill.{room}" for room in (
    "arms", "losses", "features", "objectives", "hypergrad", "hyperparameters", "tangents", "sources", "splits", "order",
    "augment", "pool", "supply", "files", "counter", "ledger", "checkpoint", "certificate", "claims", "bounds", "latency",
    "guards", "goals", "charts", "pages", "sharding", "formats",
)))  # fmt: skip


@pytest.mark.parametrize("module", HELPERS)
def test_the_rooms_beside_the_core_do_not_know_it(module):
    above = [
        "core",
        "cli",
        "commands",
        "training",
        "course",
        "search",
        "climb",
        "lessons",
        "run",
        "loop",
        "stream",
        "judge",
    ]
    above = [*(f"ev3_distill.{room}" for room in above), *PACKAGES[1:]]
    assert [name for name in imports(module) if any(inside(name, room) for room in above)] == []


@pytest.mark.parametrize("module", members("teachers", "students"))
def test_teachers_and_students_know_a_few_rooms_alone(module):
    own = module.split(".")[0]
    rooms = [
        "types",
        "errors",
        "network",
        "int8",
        *(["config", "compiling", "files", "npz"] if own == "teachers" else []),
    ]
    may = [own, *(f"ev3_distill.{room}" for room in rooms)]
    ours = [name for name in imports(module) if any(inside(name, package) for package in PACKAGES)]
    assert [name for name in ours if not allowed(name, may)] == []


COMPOSERS = (
    "ev3_distill",
    "ev3_distill.cli.main",
    "ev3_distill.cli.commands",
    "ev3_distill.export.evaluate",
    "ev3_distill.export.export",
    "ev3_distill.teachers.targets",
    "ev3_distill.training.train",
    "ev3_distill.training.setup",
    "ev3_distill.search.policy",
    "ev3_distill.search.search",
    "ev3_distill.search.sizes",
    "ev3_distill.export.teacher_latency",
)


@pytest.mark.parametrize("module", members("ev3_distill"))
def test_only_those_who_compose_import_teachers_students_and_benchmarks(module):
    rooms = PACKAGES[1:]
    found = [name for name in imports(module) if any(inside(name, room) for room in rooms)]
    assert found == [] or module in COMPOSERS
    if module == "ev3_distill":  # the façade is lazy
        assert not any(inside(name, package) for name in imports(module, at_start=True) for package in PACKAGES)


@pytest.mark.parametrize("module", members("teachers", "students"))
def test_nothing_but_the_command_line_imports_benchmarks(module):
    assert not any(inside(name, "benchmarks") for name in imports(module))


@pytest.mark.parametrize("module", MODULES)
def test_heavy_modules_wait_until_they_are_used(module):
    assert [name for name in imports(module, at_start=True) if name.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize("module", ["ev3_distill", "ev3_distill.config", "ev3_distill.cli.main", "ev3_distill.errors"])
def test_the_command_line_starts_without_jax(module):
    light = imports(module, at_start=True)
    assert [name for name in light if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax", "numpy")] == []


def test_the_command_line_starts_without_jax_in_truth():
    """Nothing that these modules import brings jax along either."""
    code = "import sys, ev3_distill, ev3_distill.config, ev3_distill.errors, ev3_distill.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"jax", "flax", "optax", "orbax", "sklearn", *HEAVY}


def test_no_cycles():
    """Imports at module level among our modules form no cycle."""
    ours = {module: {n for n in imports(module, at_start=True) if n in MODULES and n != module} for module in MODULES}
    ours = {module: names - {module.rpartition(".")[0]} for module, names in ours.items()}
    done = set()
    while ready := [module for module in ours if module not in done and ours[module] <= done]:
        done.update(ready)
    assert set(ours) - done == set()


@pytest.mark.parametrize("name", ["utils", "helpers", "misc", "common", "util", "helper"])
def test_no_room_for_odds_and_ends(name):
    assert [
        path
        for path in [*FILES, *(ROOT / "tests").rglob("*.py")]
        if name in path.relative_to(ROOT).with_suffix("").parts
    ] == []


def documented(tree):
    """Public functions and classes of a module, and their public methods."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from documented(node)


@pytest.mark.parametrize("module", MODULES)
def test_all_that_is_public_is_documented(module):
    tree = ast.parse(MODULES[module].read_text())
    assert tree.body == [] or ast.get_docstring(tree)
    assert [node.name for node in documented(tree) if not ast.get_docstring(node)] == []


def test_every_package_is_installed():
    packages = {name_of(path) for path in FILES if path.name == "__init__.py"}
    listed = re.search(r"^packages =\n((?:    .*\n)+)", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert listed is not None
    assert set(listed[1].split()) == packages
