"""The public names of the package, and runs started from Python."""

import subprocess
import sys

import pytest
from conftest import assert_same_run, variables_of

import ev3_distill
from ev3_distill import Compress, InputError, compress, load_student, teach

STUDENT = {"student": "mlp:hidden=8", "arms": ("ce",), "budget": "300"}


@pytest.mark.parametrize("name", ev3_distill.__all__)
def test_every_public_name_resolves(name):
    assert getattr(ev3_distill, name) is not None
    assert name in dir(ev3_distill)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'shrink'"):
        ev3_distill.shrink  # noqa: B018


def test_importing_the_package_loads_no_numerical_library():
    code = "import ev3_distill, sys; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compress_from_python_is_the_run_of_the_command_line(cli, here, random_logits):
    teacher = f"logits:{random_logits}"
    options = ("--teacher", teacher, "--student", "mlp:hidden=8", "--arms", "ce", "--budget", "300")
    assert cli("compress", *options, "--out", "command").code == 0
    result = compress(Compress(teacher=teacher, **STUDENT), out="python")
    assert_same_run(here / "command", here / "python")
    assert result.directory == result.student.parent == result.page.parent
    assert result.report["cost"]["steps"] == 300
    assert result.page.is_file()
    network, variables = load_student(result.student)
    assert dict(network.spec) == variables_of(result.directory)[0]
    assert variables.params


def test_options_override_the_configuration_and_guards_have_outcomes(here, random_logits):
    config = Compress(teacher=f"logits:{random_logits}", **STUDENT, guards=("params <= 1000", "accuracy >= 0.999"))
    result = compress(config, out=here / "run", budget="100")
    assert result.report["cost"]["steps"] == 100
    assert [guard["certified"] for guard in result.guards] == [True, False]
    assert not result.certified


def test_resume_from_python_keeps_the_configuration(here, random_logits):
    first = compress(teacher=f"logits:{random_logits}", **STUDENT, out="run")
    assert compress(out="run", resume=True).report == first.report
    with pytest.raises(InputError, match="a resumed run keeps its configuration; got another seed"):
        compress(out="run", resume=True, seed=1)
    with pytest.raises(InputError, match="does not exist or is empty; run is neither"):
        compress(teacher=f"logits:{random_logits}", **STUDENT, out="run")


def test_teach_from_python_makes_a_teacher(here):
    result = teach(network="mlp:hidden=16", budget="100", out="teacher")
    assert result.report["student"]["network"] == "mlp:hidden=16"
    assert result.certified
    assert load_student(result.student)[0].spec["hidden"] == [16]
