"""User callables, given as MODULE:FUNCTION."""

import sys

import pytest

from ev3_distill.errors import InputError
from ev3_distill.runtime.user_code import load_callable


@pytest.fixture
def folder(here, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (here / "mine_for_user_code.py").write_text("NUMBER = 7\ndef double(x): return 2 * x\n")
    yield here
    for name in [name for name in sys.modules if name.startswith("mine_for_user_code")]:
        del sys.modules[name]


def test_function_in_the_working_directory_is_loaded(folder):
    assert load_callable("mine_for_user_code:double", rule="r")(3) == 6
    assert load_callable("math:sqrt", rule="r")(9) == 3


def test_module_of_a_package_is_loaded(folder):
    (folder / "mine_for_user_code_package").mkdir()
    (folder / "mine_for_user_code_package" / "__init__.py").touch()
    (folder / "mine_for_user_code_package" / "part.py").write_text("def make(): return 'made'\n")
    assert load_callable("mine_for_user_code_package.part:make", rule="r")() == "made"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mine_for_user_code:triple",
            "r; got 'mine_for_user_code:triple', which fails with AttributeError: .*: check the name",
        ),
        ("mine_for_user_code:NUMBER", "got 'mine_for_user_code:NUMBER', which is of type int: name a function"),
        ("no_such_module:f", "which fails with ModuleNotFoundError"),
        (":f", "which fails with ValueError"),
        ("math:", "which fails with AttributeError"),
    ],
)
def test_names_that_cannot_be_loaded_are_rejected(folder, name, message):
    with pytest.raises(InputError, match=message):
        load_callable(name, rule="r")


@pytest.mark.parametrize("name", ["json", "sys"])
def test_file_hidden_by_another_module_is_reported(folder, name):
    (folder / f"{name}.py").write_text("def make(): ...\n")
    with pytest.raises(InputError, match=rf"{name}\.py is hidden by another module, .*; rename your file"):
        load_callable(f"{name}:make", rule="r")
