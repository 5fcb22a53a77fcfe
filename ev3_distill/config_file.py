"""TOML configuration files: the user's own, whose options the command line overrides, and config.toml of a run."""

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from ev3_distill.config import Compress, RunConfig, Teach
from ev3_distill.errors import InputError

ConfigT = TypeVar("ConfigT", bound=RunConfig)

OLDER = {
    "standardize": False,
    "joint_strata": True,
    "stored_pixels": True,
}  # what a run did whose config.toml lacks the key
OLDER_EV3 = ("exploration", "max_share", "takeover")  # keys of [ev3] in runs whose arms competed by other rules

_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", tuple: "a list"}


def read_config(kind: type[ConfigT], path: Path) -> ConfigT:
    """Reads a TOML configuration; missing keys keep their defaults.

    Args:
      kind: Compress or Teach.
      path: of the file.

    Raises:
      InputError: no such file, not TOML, an unknown key or a value of the wrong type.
    """
    return _from_dict(kind, _content(path), str(path))


def read_finished_config(kind: type[ConfigT], directory: Path) -> ConfigT:
    """Reads the configuration of a finished run, which may be of an older version.

    Raises:
      InputError: as `read_config`.
    """
    path = directory / "config.toml"
    content = _content(path)
    if isinstance(ev3 := content.get("ev3"), dict):
        content["ev3"] = {name: value for name, value in ev3.items() if name not in OLDER_EV3}
    return _from_dict(kind, {**OLDER, **content}, str(path))


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"a configuration must be a readable TOML file; got {path} ({error.strerror}): name another"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"a configuration must be a TOML file; {path} is not ({error}): fix it") from None


def read_run_config(kind: type[ConfigT], directory: Path) -> ConfigT:
    """Reads the configuration of a run that is resumed.

    Raises:
      InputError: no run directory, a run of the other command, or of a version whose arms competed by other rules.
    """
    path = directory / "config.toml"
    if not path.is_file():
        raise InputError(
            f"--resume needs a run directory; {directory} has no config.toml: name another, or start a new run with --out"
        )
    content = _content(path)
    ev3 = content.get("ev3")
    if older := [name for name in OLDER_EV3 if isinstance(ev3, dict) and name in ev3]:
        raise InputError(
            f"a run is resumed by the rules with which it started; got {directory} of an older version, whose [ev3] has "
            f"{', '.join(older)}: finish it with that version, or start a new run with --out"
        )
    content = {**OLDER, **content}
    try:
        return _from_dict(kind, content, str(path))
    except InputError as error:
        name, other, other_kind = ("teach", "compress", Compress) if kind is Teach else ("compress", "teach", Teach)
        try:
            _from_dict(other_kind, content, str(path))
        except InputError:
            raise error from None
    raise InputError(f"{name} --resume needs a run of {name}; {directory} is a run of {other}: use {other} --resume")


def check_unchanged(directory: Path, config: RunConfig, *, other: str = "") -> None:
    """Checks that a run is resumed with its own configuration.

    Args:
      directory: of the run.
      config: with which it is resumed.
      other: an option that a resumed run cannot have, if one was given.

    Raises:
      InputError: a key has another value than in the run, or `other` is not empty.
    """
    stored = read_run_config(type(config), directory)
    names = [field.name for field in dataclasses.fields(stored)]
    if changed := ", ".join(name for name in names if getattr(stored, name) != getattr(config, name)) or other:
        raise InputError(
            f"a resumed run keeps its configuration; got another {changed}: resume without it, or start a new run with --out"
        )


def _from_dict(kind: Any, content: dict[str, Any], place: str) -> Any:
    """Builds a configuration from the content of a table; `place` names the table in errors."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in fields:
            raise InputError(f"a configuration has the keys {', '.join(fields)}; got '{name}' in {place}: remove it")
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise InputError(f"'{name}' in {place} must be a table; got {value!r}: write [{name}]")
            values[name] = _from_dict(type(default), value, f"[{name}] of {place}")
            continue
        values[name] = _convert(hints[name], value)
        if not _has_type(hints[name], values[name]):
            raise InputError(
                f"'{name}' in {place} must be {_TYPE_NAMES[type(default)]}; got {value!r}: write it like {default!r}"
            )
    return kind(**values)


def _convert(hint: Any, value: Any) -> Any:
    """Converts what TOML writes differently: lists become tuples, and an integer may stand for a float."""
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_convert(typing.get_args(hint)[0], part) for part in value)
    if hint is float and type(value) is int:
        return float(value)
    return value


def _has_type(hint: Any, value: Any) -> bool:
    """Whether a value, or every element of a tuple, has exactly this type."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(type(part) is typing.get_args(hint)[0] for part in value)
    return type(value) is hint
