"""Writes the parts of the reference that follow from the code: command line, student families, losses, public Python names."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

COMMANDS = ("compress", "teach", "evaluate", "copies", "report", "export", "bench")
_LONG = 40  # characters of a default that is not shown
_WIDTH = "110"  # columns of the help text
_EXAMPLE_SHAPES = ([32, 32, 3], [64, 3], [16])  # an image, a sequence, a vector


def write_all(directory: Path) -> None:
    """Writes every generated page."""
    directory.mkdir(exist_ok=True)
    for name, text in (
        ("command-line.md", command_line()),
        ("students.md", students()),
        ("losses.md", losses()),
        ("api.md", api()),
    ):
        path = directory / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def command_line() -> str:
    """The help text of every command."""
    parts = [f"## {name}\n\n```text\n{help_text(name)}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


def help_text(command: str) -> str:
    """What `ev3-distill COMMAND --help` prints."""
    from ev3_distill.cli.main import main

    output, before = io.StringIO(), {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR", "TERM")}
    os.environ.update(COLUMNS=_WIDTH, NO_COLOR="1", TERM="dumb")
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main([command, "--help"])
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return "\n".join(line.rstrip() for line in output.getvalue().strip().splitlines())


def students() -> str:
    """Every student family with its options, defaults, smallest network and growth moves."""
    from ev3_distill.students import FAMILIES

    parts = []
    for name, family in FAMILIES.items():
        make = family.network
        rows = [f"| `{option}` | `{_text(default)}` | {meaning} |" for option, default, meaning in options_of(make)]
        tiny = ",".join(f"{option}={_text(value)}" for option, value in family.tiny.items())
        moves = ", ".join(f"`{move}`" for move in _moves(family)) or "none"
        parts += [
            f"## {name}\n\n{summary_of(make)}\n\n| option | default | meaning |\n| --- | --- | --- |",
            "\n".join(rows),
            f"\n`--start tiny` begins with `{name}:{tiny}`. Growth moves: {moves}.\n",
        ]
    return "\n".join(parts)


def losses() -> str:
    """Every loss on logits and on features."""
    from ev3_distill.tasks.classification.feature_losses import FEATURE_LOSSES
    from ev3_distill.tasks.classification.losses import LOSSES

    def rows(zoo: dict[str, Callable[..., Any]]) -> str:
        return "\n".join(f"| `{name}` | {summary_of(make).replace('|', '&#124;')} |" for name, make in zoo.items())

    header = "| name | loss |\n| --- | --- |"
    return f"## Losses on logits\n\n{header}\n{rows(LOSSES)}\n\n## Losses on features\n\n{header}\n{rows(FEATURE_LOSSES)}\n"


def api() -> str:
    """Directives that document every public name of `ev3_distill`."""
    import ev3_distill

    names = sorted(ev3_distill.__all__, key=str.lower)
    parts: list[str] = []
    for title, kind in (
        ("Functions", "function"),
        ("Classes", "class"),
        ("Modules", "module"),
        ("Other names", "data"),
    ):
        of_kind = [name for name in names if kind_of(getattr(ev3_distill, name)) == kind]
        if of_kind:
            parts += [f"## {title}\n"]
        for name in of_kind:
            parts += [f"### {name}\n", *directive(name, kind, getattr(ev3_distill, name))]
    return "\n".join(parts)


def kind_of(value: Any) -> str:
    """How Sphinx documents a public name."""
    if isinstance(value, ModuleType):
        return "module"
    return "class" if inspect.isclass(value) else "function" if callable(value) else "data"


def directive(name: str, kind: str, value: Any) -> Iterator[str]:
    """The lines that document one public name."""
    if kind == "module":
        public = [n for n in getattr(value, "__all__", vars(value)) if not n.startswith("_")]
        functions = [n for n in public if getattr(getattr(value, n), "__module__", "") == value.__name__]
        yield f"{_first_paragraph(value.__doc__)}\n"
        yield "| name | what it is |\n| --- | --- |"
        for function in functions:
            if inspect.isroutine(getattr(value, function)) and not function.isupper():
                yield f"| `{name}.{function}` | {summary_of(getattr(value, function)).replace('|', '&#124;')} |"
        yield ""
        return
    fields = fields_of(value) if kind == "class" else []
    members = "   :members:\n" if kind == "class" else ""
    if fields:
        members += f"   :exclude-members: {', '.join(field for field, *_ in fields)}\n"
    yield f"```{{eval-rst}}\n.. auto{kind}:: ev3_distill.{name}\n{members}```\n"
    if fields:
        yield "| field | type | default | meaning |\n| --- | --- | --- | --- |"
        for row in fields:
            code = [f"`{part.replace('|', chr(92) + '|')}`" if part else "" for part in row[:3]]
            yield f"| {' | '.join(code)} | {row[3].replace('|', '&#124;')} |"
        yield ""


def fields_of(cls: type) -> list[tuple[str, str, str, str]]:
    """The fields of a NamedTuple or dataclass, inherited ones first: name, type, default, and the comment or text beside it."""
    if not (dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")):
        return []
    fields: dict[str, tuple[str, str, str, str]] = {}
    for base in reversed(cls.__mro__[:-1]):
        if base.__module__.startswith("ev3_distill"):
            fields |= {row[0]: row for row in _fields_in(base)}
    described, module = attribute_docs(cls), vars(importlib.import_module(cls.__module__))
    return [
        (*row[:3], row[3] or described.get(row[0], "") or summary_of(module.get(row[1].partition(" | ")[0])))
        for row in fields.values()
    ]


def _fields_in(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """The fields that a class itself declares."""
    source = textwrap.dedent(inspect.getsource(cls))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for i, node in enumerate(tree.body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id[0] == "_":
            continue
        after = tree.body[i + 1] if i + 1 < len(tree.body) else None
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            text = inspect.cleandoc(after.value.value)
        else:
            last = after.lineno if after else (tree.end_lineno or 0) + 1
            text = " ".join(comments[line] for line in range(node.lineno, last) if line in comments)
            text = text.removeprefix("type: ignore[assignment]").lstrip("# ")
        kind, default = ast.unparse(node.annotation), "" if node.value is None else ast.unparse(node.value)
        if kind.startswith("Annotated["):
            kind = kind.removeprefix("Annotated[").rsplit("],", 1)[0].split(", ")[0] + ("]" if "tuple[" in kind else "")
        yield node.target.id, kind, default if len(default) < _LONG else "", " ".join(text.split())


def attribute_docs(cls: type) -> dict[str, str]:
    """The `Attributes` section of a class's docstring, by name."""
    return _section(cls, "Attributes")


def options_of(make: Callable[..., Any]) -> list[tuple[str, Any, str]]:
    """A family's options: name, default, and meaning from the docstring's `Args`."""
    meanings = argument_docs(make)
    parameters = [p for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [(p.name, p.default, meanings[p.name]) for p in parameters]


def argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    """The `Args` section of a docstring, by argument."""
    return _section(function, "Args")


def _section(value: Any, title: str) -> dict[str, str]:
    match = re.search(rf"^{title}:\n(.*?)(?=^\S|\Z)", inspect.getdoc(value) or "", re.DOTALL | re.MULTILINE)
    docs: dict[str, str] = {}
    for text in re.split(r"^  (?=\w+:)", match[1] if match else "", flags=re.MULTILINE)[1:]:
        name, _, meaning = text.partition(":")
        docs[name] = " ".join(meaning.split()).rstrip(".") + "."
    return docs


def summary_of(value: Any) -> str:
    """The first line of a docstring; empty without one."""
    return "" if value is None else (inspect.getdoc(value) or "").partition("\n")[0]


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


def _moves(family: Any) -> list[str]:
    """The growth moves of a family's default network, on an input that it takes."""
    for shape in _EXAMPLE_SHAPES:
        with contextlib.suppress(Exception):  # another input's shape
            family.network(shape, 10)
            return list(family.growth(shape, 10).moves)
    return []


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


if __name__ == "__main__":
    importlib.import_module("ev3_distill")
    write_all(Path(__file__).resolve().parent / "_generated")
