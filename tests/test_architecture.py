"""Architecture: arrows between rooms, imports that wait for their use, sizes, names and docstrings."""

import ast
import subprocess
import sys

import import_map
import pytest
from import_map import PACKAGE, ROOT, TOP_FOLDERS, Import, imported_names

MODULES = import_map.modules()
SOURCES = {name: path.read_text() for name, path in MODULES.items()}
ROOMS = import_map.rooms()
HEAVY = (
    *("clu", "torch", "onnx", "onnxruntime", "skops", "sklearn", "tensorflow", "tensorflow_datasets"),
    *("matplotlib", "PIL", "jinja2"),
)
NUMERICS = ("jax", "jaxlib", "flax", "optax", "orbax", "numpy", "scipy")
LIGHT = (PACKAGE, f"{PACKAGE}.config", f"{PACKAGE}.guards", f"{PACKAGE}.errors", f"{PACKAGE}.cli.main")
MODULE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8  # limits on size


def between(sources=None, *, at_start=False):
    return import_map.imports_between_modules(SOURCES if sources is None else sources, MODULES, at_start=at_start)


# The arrows.


def test_every_room_is_listed():
    assert {import_map.room_of(module) for module in MODULES} == set(ROOMS)


def test_listed_arrows_point_down():
    order = list(ROOMS)
    up = [
        (name, other)
        for name, room in ROOMS.items()
        for other in room.imports
        if order.index(other) >= order.index(name)
    ]
    assert up == []


def test_imports_follow_the_arrows():
    assert import_map.forbidden(between(), ROOMS) == []


def test_every_listed_arrow_is_used():
    used = {(import_map.room_of(one.source), import_map.room_of(one.target)) for one in between()}
    assert [(name, other) for name, room in ROOMS.items() for other in room.imports if (name, other) not in used] == []


def test_modules_import_one_another_without_circles():
    assert import_map.circle(between(at_start=True)) == set()


def test_an_added_upward_import_is_reported():
    sources = SOURCES | {f"{PACKAGE}.types": SOURCES[f"{PACKAGE}.types"] + f"\nfrom {PACKAGE}.core import step\n"}
    assert import_map.forbidden(between(sources), ROOMS) == [Import(f"{PACKAGE}.types", f"{PACKAGE}.core.step")]


def test_an_upward_import_inside_a_function_is_reported():
    added = f"\n\ndef late():\n    from {PACKAGE} import students\n"
    sources = SOURCES | {f"{PACKAGE}.core.adapt": SOURCES[f"{PACKAGE}.core.adapt"] + added}
    assert import_map.forbidden(between(sources), ROOMS) == [Import(f"{PACKAGE}.core.adapt", f"{PACKAGE}.students")]


def test_an_added_circle_is_reported():
    added = f"\nfrom {PACKAGE}.core import step\n"
    sources = SOURCES | {f"{PACKAGE}.core.assess": SOURCES[f"{PACKAGE}.core.assess"] + added}
    circle = import_map.circle(between(sources, at_start=True))
    assert {f"{PACKAGE}.core.assess", f"{PACKAGE}.core.step"} <= circle


def test_a_room_that_is_not_listed_is_reported():
    imports = iter([Import(f"{PACKAGE}.attic.box", f"{PACKAGE}.types")])
    assert len(import_map.forbidden(imports, ROOMS)) == 1


def test_imports_are_read_from_every_form():
    source = f"""
import a.b, torch
from {PACKAGE} import students, errors as e
from {PACKAGE}.core.step import make_step
if TYPE_CHECKING:
    import matplotlib
else:
    import d
def f():
    import c
    importlib.import_module("g")
class C:
    import h
"""
    ours = {f"{PACKAGE}.students", f"{PACKAGE}.errors", f"{PACKAGE}.core.step"}
    assert imported_names(source, f"{PACKAGE}.cli.main", MODULES) == ours | {"a.b", "torch", "c", "d", "g", "h"}
    at_start = imported_names(source, f"{PACKAGE}.cli.main", MODULES, at_start=True)
    assert at_start == ours | {"a.b", "torch", "d", "h"}
    relative = imported_names("from . import adapt\nfrom ..types import x", f"{PACKAGE}.core.step", MODULES)
    assert relative == {f"{PACKAGE}.core.adapt", f"{PACKAGE}.types"}
    assert imported_names("from .step import x", f"{PACKAGE}.core", MODULES) == {f"{PACKAGE}.core.step"}


@pytest.mark.parametrize("module", MODULES)
def test_our_modules_are_imported_by_their_full_names(module):
    """`import teachers` would find the folder in a checkout, and a user's own module elsewhere."""
    bare = [name for name in imported_names(SOURCES[module], module, MODULES) if name.split(".")[0] in TOP_FOLDERS]
    assert bare == []


def test_the_map_in_the_documentation_is_current():
    command = [sys.executable, str(ROOT / "docs" / "render_map.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Imports that wait.


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_at_use(module):
    at_start = imported_names(SOURCES[module], module, MODULES, at_start=True)
    assert [name for name in at_start if name.split(".")[0] in HEAVY] == []


def test_types_import_jax_alone():
    names = imported_names(SOURCES[f"{PACKAGE}.types"], f"{PACKAGE}.types", MODULES)
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"jax"}


def test_the_core_imports_jax_and_nothing_else_from_outside():
    core = [module for module in MODULES if import_map.room_of(module) == "core"]
    names = {name.split(".")[0] for module in core for name in imported_names(SOURCES[module], module, MODULES)}
    assert names - sys.stdlib_module_names <= {"jax", "optax", PACKAGE}


def test_the_command_line_starts_without_numerics():
    code = f"import sys, {', '.join(LIGHT)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {*NUMERICS, *HEAVY}


# Sizes, names and docstrings.


def places_over_the_limits():
    """Modules and functions that exceed the limits, as they are named in arrows.toml."""
    for module, source in SOURCES.items():
        place = MODULES[module].relative_to(ROOT).as_posix().removeprefix(f"{PACKAGE}/")
        if source.count("\n") > MODULE_LINES:
            yield place
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(argument.arg not in ("self", "cls") for argument in arguments)
                if lines > FUNCTION_LINES or count > PARAMETERS:
                    yield f"{place}:{node.name}"


def test_modules_and_functions_keep_the_limits_on_size():
    assert set(places_over_the_limits()) == set(import_map.exceptions())


@pytest.mark.parametrize("name", ["utils", "helpers", "misc", "common", "util", "helper"])
def test_no_module_is_named_for_odds_and_ends(name):
    paths = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    assert [path for path in paths if name in path.relative_to(ROOT).with_suffix("").parts] == []


def public_definitions(tree):
    """Public functions and classes of a module, and their public methods."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


@pytest.mark.parametrize("module", MODULES)
def test_public_definitions_have_docstrings(module):
    tree = ast.parse(SOURCES[module])
    assert tree.body == [] or ast.get_docstring(tree)
    assert [node.name for node in public_definitions(tree) if not ast.get_docstring(node)] == []


def test_top_folders_are_reached_through_links():
    for folder in TOP_FOLDERS:
        link = ROOT / PACKAGE / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder
