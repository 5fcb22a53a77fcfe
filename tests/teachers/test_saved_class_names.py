"""A saved network as a teacher: its outputs are matched with the data's classes by the names in its run or export."""

import json

import jax
import numpy as np
import pytest

from ev3_distill import students
from ev3_distill.config import Preprocessing
from ev3_distill.errors import InputError
from ev3_distill.teachers.kinds.flax import saved_teacher
from ev3_distill.teachers.teacher import Request

INPUTS = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


@pytest.fixture
def network():
    network = students.from_name("mlp:hidden=4", (6,), 3)
    return network, network.init(jax.random.key(0))


def logits(place, network, names):
    request = Request("flax:x", Preprocessing(), (6,), len(names), names, load_network=lambda _: network)
    return saved_teacher(str(place), request).outputs(INPUTS)["logits"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("layout", ["run", "student", "size", "export"])
def test_outputs_are_matched_by_name(tmp_path, network, layout):
    classes = ["cat", "cafe\u0301", "dog"]
    if layout == "export":
        place = tmp_path / "out"
        write(place / "model.json", {"classes": classes})
    else:
        write(tmp_path / "run/report.json", {"data": {"classes": classes}})
        place = tmp_path / "run" / {"run": "", "student": "student", "size": "sizes/01/student"}[layout]
    own = logits(tmp_path / "nothing", network, ("0", "1", "2"))
    assert (logits(place, network, ("dog", "caf\u00e9", "cat")) == own[:, [2, 1, 0]]).all()
    assert (logits(place, network, ("cat", "dog")) == own[:, [0, 2]]).all()
    assert (logits(place, network, ("0", "1", "2")) == own).all()  # positions
    with pytest.raises(InputError, match="it lacks cow"):
        logits(place, network, ("cow", "cat", "dog"))


def test_names_that_are_numbers_or_unknown(tmp_path, network):
    own = logits(tmp_path, network, ("a", "b", "c"))
    write(tmp_path / "numbers/report.json", {"data": {"classes": ["0", "1", "2"]}})
    assert (logits(tmp_path / "numbers", network, ("a", "b", "c")) == own).all()
    write(tmp_path / "ids/report.json", {"data": {"classes": ["7", "17", "5"]}})
    assert (logits(tmp_path / "ids", network, ("5", "7", "17")) == own[:, [2, 0, 1]]).all()
    write(tmp_path / "fewer/report.json", {"data": {"classes": ["x", "y"]}})
    assert (logits(tmp_path / "fewer", network, ("a", "b", "c")) == own).all()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/report.json").write_text("{")
    assert (logits(tmp_path / "damaged", network, ("a", "b", "c")) == own).all()
