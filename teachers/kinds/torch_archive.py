"""Makes an archive of `torch.export.save` safe to load: only data and calls of PyTorch's own operators remain.

`torch.export.load` can run code. It unpickles the sample inputs (with the unrestricted unpickler as a fallback), tensor
subclasses and custom objects; it evaluates the text of symbolic sizes; and it compiles the text of names and guards. So this
module rewrites the archive in memory without sample inputs, guards and metadata, and rejects it if anything else could name
code. It depends on the format of PyTorch 2.9 and later (schema 8).
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ev3_distill.errors import InputError

SAVE = (
    "torch.export.save(torch.export.export(model.eval(), (example,), dynamic_shapes=({0: torch.export.Dim('batch')},)), "
    "FILE)"
)

_TEXT = re.compile(r"-?[\w.]*", re.ASCII)
_NAME = re.compile(r"\w*", re.ASCII)  # of a value in the graph; becomes a variable of compiled code
_KEY = re.compile(r"[\w.*+\-/() ]*", re.ASCII)  # of a table; only looked up
_FREE = (
    "as_string",
    "as_strings",
    "torch_version",
    "expr_str",
    "in_spec",
    "out_spec",
)  # texts that are data, or have a check of their own
_OPERATOR = re.compile(
    r"""torch\.ops\.aten\.(?!from_file)(?!__(?!and__|or__|xor__|lshift__|rshift__))\w+(\.\w+)?
    |torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)
    |torch\.(sym_|_sym_)\w+
    |_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|pow|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|xor|getitem)
    |math\.(ceil|floor|trunc|sqrt)""",
    re.ASCII | re.VERBOSE,
)
_SPEC_TYPES = ("builtins.tuple", "builtins.list", "builtins.dict", None)
_EXPRESSION = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare,
               ast.operator, ast.unaryop, ast.cmpop)  # fmt: skip


class _Unsafe(ValueError):
    """An archive holds something that is not data."""


def safe_archive(path: Path) -> io.BytesIO:
    """Rewrites an archive without the parts that would run code.

    Raises:
      InputError: it is not an archive of a recent `torch.export.save`, or it is not safe to load.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _rebuilt(archive)
    except _Unsafe as error:
        raise InputError(
            f"a .pt2 teacher holds only data and PyTorch's own operators, so that loading it runs no code; {path} has "
            f"{error}: export it without that, or give python:MODULE:FUNCTION"
        ) from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError) as error:
        raise InputError(
            f"torch:FILE.pt2 needs a complete archive of torch.export; {path} cannot be read ({error}): write it with {SAVE}"
        ) from None


def _rebuilt(archive: zipfile.ZipFile) -> io.BytesIO:
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise _Unsafe("two entries with the same name")
    if not any(name.endswith("/models/model.json") for name in names):
        raise KeyError("it lacks models/model.json, which a program of torch.export has")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as safe:  # stored without compression, as torch does
        for name in names:
            safe.writestr(name, _entry(name, archive))
    content.seek(0)
    return content


def _entry(name: str, archive: zipfile.ZipFile) -> bytes:
    """Content of one entry, checked."""
    inner = name.partition("/")[2]
    if inner.startswith("data/sample_inputs/"):
        return b""  # a pickle that the program does not need
    if inner.startswith(("data/weights/", "data/constants/")) and inner.endswith("_config.json"):
        content = archive.read(name)
        for key, value in _leaves(json.loads(content)):
            if key == "use_pickle" and value is not False:
                raise _Unsafe(f"pickled objects ({inner})")
        return content
    if inner == "models/model.json":
        program = _without(json.loads(archive.read(name)), {"metadata": {}, "guards_code": []})
        _check_program(program)
        return json.dumps(program).encode()
    known = re.fullmatch(
        r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|\.data/\w+", inner
    )
    if not known:
        raise _Unsafe(f"an entry '{inner}', which is neither a program nor weights")
    return archive.read(name)


def _without(tree: Any, blank: dict[str, Any]) -> Any:
    if isinstance(tree, dict):
        return {key: blank[key] if key in blank else _without(value, blank) for key, value in tree.items()}
    return [_without(value, blank) for value in tree] if isinstance(tree, list) else tree


def _leaves(tree: Any, key: str = "-") -> Iterator[tuple[str, Any]]:
    """Yields ("", key) for each key, and (key, value) for each value that is not a container."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield "", name
            yield from _leaves(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, key)
    else:
        yield key, tree


def _check_program(program: Any) -> None:
    for key, value in _leaves(program):
        if not isinstance(value, str):
            continue
        pattern = {"": _KEY, "name": _NAME}.get(key, _TEXT)
        if key not in _FREE and not pattern.fullmatch(value):
            raise _Unsafe(f"an invalid name, '{value[:80]}'")
        if key in ("target", "as_operator") and not _OPERATOR.fullmatch(value):
            raise _Unsafe(f"the operator {value}, which is not a plain operator of PyTorch")
        if key == "expr_str":
            _check_expression(value)
        if key in ("in_spec", "out_spec"):
            _check_spec(value)


def _check_expression(text: str) -> None:
    """Checks a symbolic size: only calls of classes such as Mul and Symbol on numbers, names and each other."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        raise _Unsafe(f"a size that cannot be parsed, '{text[:80]}'") from None
    for node in nodes:
        called = not isinstance(node, ast.Call) or (
            isinstance(node.func, ast.Name) and re.fullmatch(r"[A-Z]\w*|floor|ceiling", node.func.id, re.ASCII)
        )
        plain = not isinstance(node, ast.Constant) or not isinstance(node.value, str | bytes) or _is_name(node.value)
        named = not isinstance(node, ast.Name) or not node.id.startswith("_")
        if not (isinstance(node, _EXPRESSION) and called and plain and named):
            raise _Unsafe(f"a size that is not an expression of sizes, '{text[:80]}'")


def _is_name(value: str | bytes) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value, re.ASCII) is not None


def _check_spec(text: str) -> None:
    for key, value in _leaves(json.loads(text) if text else {}):
        if key == "type" and value not in _SPEC_TYPES:
            raise _Unsafe(f"inputs or outputs in a {value} (only tuples, lists and dictionaries are allowed)")
