"""Writes the parts of the reference that follow from the code: command line, student families, losses, public Python names."""

import contextlib
import importlib
import inspect
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

COMMANDS = ("compress", "teach", "evaluate", "report", "export", "bench")
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
            if inspect.isroutine(getattr(value, function)):
                yield f"| `{name}.{function}` | {summary_of(getattr(value, function)).replace('|', '&#124;')} |"
        yield ""
        return
    members = "   :members:\n" if kind == "class" else ""
    yield f"```{{eval-rst}}\n.. auto{kind}:: ev3_distill.{name}\n{members}```\n"


def options_of(make: Callable[..., Any]) -> list[tuple[str, Any, str]]:
    """A family's options: name, default, and meaning from the docstring's `Args`."""
    meanings = argument_docs(make)
    parameters = [p for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return [(p.name, p.default, meanings[p.name]) for p in parameters]


def argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    """The `Args` section of a docstring, by argument."""
    match = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(function) or "", re.DOTALL | re.MULTILINE)
    docs: dict[str, str] = {}
    for text in re.split(r"^  (?=\w+:)", match[1] if match else "", flags=re.MULTILINE)[1:]:
        name, _, meaning = text.partition(":")
        docs[name] = " ".join(meaning.split()).rstrip(".") + "."
    return docs


def summary_of(value: Any) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(value) or "").partition("\n")[0]


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
