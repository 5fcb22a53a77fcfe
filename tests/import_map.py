"""Reads the imports of the repository's modules and the allowed arrows between rooms."""

import ast
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ev3_distill"
TOP_FOLDERS = ("teachers", "students", "benchmarks")  # installed as ev3_distill.teachers and so on
ARROWS = ROOT / "tests" / "arrows.toml"


class Room(NamedTuple):
    """One [[room]] of arrows.toml."""

    name: str
    holds: str
    imports: tuple[str, ...]


class Import(NamedTuple):
    """One import of one of our modules by another."""

    source: str  # dotted name of the importing module
    target: str  # dotted name of the imported module


def rooms(path: Path = ARROWS) -> dict[str, Room]:
    """The rooms of arrows.toml from the lowest to the highest."""
    content = tomllib.loads(path.read_text())
    return {row["name"]: Room(row["name"], row["holds"], tuple(row["imports"])) for row in content["room"]}


def exceptions(path: Path = ARROWS) -> dict[str, str]:
    """Reasons of arrows.toml for modules and functions that exceed the limits on size, by place."""
    return {row["place"]: row["reason"] for row in tomllib.loads(path.read_text()).get("exception", [])}


def modules() -> dict[str, Path]:
    """All modules by dotted name. Files are read from the top-level folders, not through the links in ev3_distill."""
    paths = [path for folder in (PACKAGE, *TOP_FOLDERS) for path in (ROOT / folder).rglob("*.py")]
    real = [path for path in sorted(paths) if not any(parent.is_symlink() for parent in path.parents)]
    return {dotted_name(path.relative_to(ROOT)): path for path in real}


def dotted_name(path: Path) -> str:
    """The module name of a path relative to the root: `students/families/mlp.py` is ev3_distill.students.families.mlp."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of one of our modules."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "api"


def imported_names(source: str, module: str, known: Mapping[str, Path], *, at_start: bool = False) -> set[str]:
    """Dotted names that a module imports; those of our package down to the module.

    Args:
      source: Python source code.
      module: its dotted name, for relative imports.
      known: our modules by dotted name.
      at_start: leave out imports inside functions. Imports for type checking alone never count.
    """
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        names.update(_names_of(node, module, known))
        children = node.orelse if _is_type_checking(node) else ast.iter_child_nodes(node)
        for child in children:
            visit(child)

    visit(ast.parse(source))
    return names


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _names_of(node: ast.AST, module: str, known: Mapping[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            is_package = module in known and known[module].name == "__init__.py"
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = ".".join(filter(None, [*package[: len(package) - node.level + 1], base]))
        return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
    called = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
    if called and node.args and isinstance(node.args[0], ast.Constant):
        return [node.args[0].value]
    return []


def imports_between_modules(
    sources: Mapping[str, str], known: Mapping[str, Path], *, at_start: bool
) -> Iterator[Import]:
    """Imports among our own modules.

    Args:
      sources: source code by dotted name.
      known: our modules by dotted name.
      at_start: leave out imports inside functions.
    """
    for module, source in sources.items():
        for name in sorted(imported_names(source, module, known, at_start=at_start)):
            if name in sources and name != module:
                yield Import(module, name)


def forbidden(imports: Iterator[Import], allowed: Mapping[str, Room]) -> list[Import]:
    """Imports from room to room that arrows.toml does not allow."""
    return [
        one
        for one in imports
        if (here := room_of(one.source)) != (there := room_of(one.target))
        and (here not in allowed or there not in allowed[here].imports)
    ]


def circle(imports: Iterator[Import]) -> set[str]:
    """Modules that import one another in a circle, or that need such a module; empty where there is none.

    A package's `__init__` may import its own modules although these need the package.
    """
    needs: dict[str, set[str]] = {}
    for source, target in imports:
        needs.setdefault(target, set())
        needs.setdefault(source, set())
        if not source.startswith(target + "."):
            needs[source].add(target)
    done: set[str] = set()
    while ready := {module for module in needs if module not in done and needs[module] <= done}:
        done |= ready
    return set(needs) - done
