"""A configuration's TOML file: options that the command line may override, and what a run keeps of its own."""

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from ev3_distill import config
from ev3_distill.errors import InputError

C = TypeVar("C", bound=config.Compress | config.Teach)


def read_config(kind: type[C], path: Path) -> C:
    """Reads a TOML configuration.

    Raises:
      InputError: no such file, not TOML, an unknown key or a value of a wrong type.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"a configuration is a readable TOML file; got {path} ({error.strerror}): name another"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"a configuration is a TOML file; {path} is not ({error}): mend it") from None
    return _from_dict(kind, content, str(path))


def config_of_run(kind: type[C], directory: Path) -> C:
    """The configuration of a run of compress or teach.

    Raises:
      InputError: no such run, or one of the other.
    """
    if not (directory / "config.toml").is_file():
        raise InputError(
            f"--resume needs the directory of a run; {directory} has no config.toml: name another, or start one by --out"
        )
    path = directory / "config.toml"
    try:
        return read_config(kind, path)
    except InputError as error:
        name, other = "compress", "teach"
        of_other: type[config.Compress | config.Teach] = config.Teach
        if kind is config.Teach:
            name, other, of_other = other, name, config.Compress
        try:
            read_config(of_other, path)
        except InputError:
            raise error from None
    raise InputError(f"{name} --resume needs a run of {name}; {directory} is one of {other}: use {other} --resume")


def _from_dict(kind: Any, content: dict[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in fields:
            raise InputError(f"a configuration's keys are {', '.join(fields)}; got '{name}' in {where}: remove it")
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise InputError(f"'{name}' in {where} is a table; got {value!r}: write [{name}]")
            values[name] = _from_dict(type(default), value, f"[{name}] of {where}")
            continue
        values[name] = _like(hints[name], value)
        if not _is(hints[name], values[name]):
            raise InputError(
                f"'{name}' in {where} is a {type(default).__name__}; got {value!r}: write it like {default!r}"
            )
    return kind(**values)


def _like(hint: Any, value: Any) -> Any:
    """TOML has no tuples, and 1 may stand for 1.0."""
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_like(typing.get_args(hint)[0], part) for part in value)
    if hint is float and type(value) is int:
        return float(value)
    return value


def _is(hint: Any, value: Any) -> bool:
    """Whether a value is of a type, or is a tuple of such."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(type(part) is typing.get_args(hint)[0] for part in value)
    return type(value) is hint
