"""Standardization is a part of the student: of its outputs, its files, its digest, its growth and its exports."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_runner import run_onnx

from ev3_distill import students
from ev3_distill.config import Compress
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError
from ev3_distill.export.export_config import ExportConfig
from ev3_distill.export.model_file import exported_forward
from ev3_distill.search import first_network
from ev3_distill.search.sizes import Sizes
from ev3_distill.students.growth import grow
from ev3_distill.students.growth.narrow import narrow
from ev3_distill.students.quantization import RANGES
from ev3_distill.training.setup import classification_setup

RNG = np.random.default_rng(0)
MEAN, SCALE = np.array([1e6, 0.5, -3], np.float32), np.array([10, 1e-3, 1 / 3], np.float32)
STATISTICS = {"mean": MEAN.tolist(), "scale": SCALE.tolist()}
RAW = (MEAN + SCALE * RNG.normal(size=(6, 3))).astype(np.float32)
READY = (RAW - MEAN) / SCALE


def plain(name="mlp:hidden=4"):
    return students.from_name(name, (3,), 2)


def logits(network, variables, inputs, **how):
    return np.asarray(network.apply(variables, jnp.asarray(inputs), train=False, **how)[0])


def test_outputs_are_those_of_the_network_on_standardized_inputs():
    network, key = students.standardized(plain(), STATISTICS), jax.random.key(0)
    variables = network.init(key)
    np.testing.assert_allclose(logits(network, variables, RAW), logits(plain(), variables, READY), atol=1e-6)
    trained, _ = network.apply(variables, jnp.asarray(RAW), train=True, key=key)
    expected, _ = plain().apply(variables, jnp.asarray(READY), train=True, key=key)
    np.testing.assert_allclose(trained, expected, atol=1e-6)


def test_bytes_count_as_pixels_and_one_number_serves_all_entries():
    network = students.standardized(plain(), {"mean": [0.5], "scale": [0.25]})
    variables, inputs = network.init(jax.random.key(0)), np.array([[0, 51, 255]], np.uint8)
    expected = logits(plain(), variables, (inputs.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.25))
    np.testing.assert_allclose(logits(network, variables, inputs), expected, atol=1e-6)


def test_a_saved_student_keeps_its_statistics_exactly(tmp_path):
    network = students.standardized(plain(), STATISTICS)
    variables = network.init(jax.random.key(0))
    students.save(tmp_path / "student", network, variables)
    loaded, same = students.load(tmp_path / "student")
    assert loaded.spec == network.spec
    np.testing.assert_array_equal(logits(loaded, same, RAW), logits(network, variables, RAW))
    assert students.name_of(loaded.spec) == "mlp:hidden=4"


def test_a_student_with_other_statistics_than_were_saved_is_refused(tmp_path):
    network = students.standardized(plain(), STATISTICS)
    students.save(tmp_path / "student", network, network.init(jax.random.key(0)))
    moved = {**network.spec, "standardize": {**STATISTICS, "scale": [10, 1e-3, 0.33]}}
    (tmp_path / "student" / "spec.json").write_text(json.dumps(moved))
    with pytest.raises(InputError, match=r"a saved student must stay as it was written; .* holds another spec than "):
        students.load(tmp_path / "student")


def test_growth_and_narrowing_keep_the_statistics():
    network, key = students.standardized(plain(), STATISTICS), jax.random.key(1)
    variables = network.init(key)
    larger, grown = grow(key, network.spec, variables, "wider")
    assert larger.spec["standardize"] == network.spec["standardize"]
    np.testing.assert_allclose(logits(larger, grown, RAW), logits(network, variables, RAW), atol=1e-5)
    smaller, part = narrow(key, larger.spec, grown, network.spec)
    assert smaller.spec == network.spec
    assert logits(smaller, part, RAW).shape == (6, 2)
    with pytest.raises(InputError, match="growth keeps how inputs are standardized; got other statistics, from mlp "):
        grow(key, network.spec, variables, plain("mlp:hidden=8").spec)


def test_int8_quantizes_the_standardized_inputs():
    network = students.with_precision(students.standardized(plain(), STATISTICS), "int8")
    variables = network.fit(network.init(jax.random.key(0)), jnp.asarray(RAW))
    low = np.asarray(variables.stats[RANGES]["low"])
    np.testing.assert_allclose(low.min(), min(READY.min(), low.min()), rtol=1e-6)
    assert np.abs(low).max() < 100  # no range of raw inputs
    again = students.build(json.loads(json.dumps(network.spec)))
    np.testing.assert_array_equal(logits(again, variables, RAW), logits(network, variables, RAW))
    assert (
        np.abs(
            logits(network, variables, RAW) - logits(plain(), network.init(jax.random.key(0))._replace(stats={}), READY)
        ).max()
        < 0.1
    )


def test_exported_programs_take_raw_inputs():
    network = students.standardized(plain(), STATISTICS)
    variables = network.init(jax.random.key(0))
    forward = exported_forward(network, ExportConfig("onnx"))
    outputs = run_onnx(lambda inputs: forward(variables, inputs), RAW)
    np.testing.assert_allclose(outputs, logits(network, variables, RAW), atol=1e-5)


def test_every_student_of_a_run_standardizes_by_the_explore_split():
    inputs = (RNG.normal(size=(200, 3)) * [1, 100, 1e-3] + [0, 50, 1]).astype(np.float32)
    dataset = Dataset(inputs, np.arange(200, dtype=np.int32) % 2, 2, ("a", "b"), None, "npz:data.npz", "0")
    config = Compress(start="tiny", student="mlp:hidden=4", guards=("accuracy >= 0.5",))
    setup = classification_setup(config, config.student, dataset, 2)
    statistics = setup.network.spec["standardize"]
    explore = inputs[setup.rows["explore"]].astype(np.float64)
    np.testing.assert_allclose(statistics["mean"], explore.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics["scale"], explore.std(0), rtol=1e-5)
    assert first_network(config, setup.network.spec).spec["standardize"] == statistics
    ladder = Compress(sizes=("mlp:hidden=2", "mlp:hidden=4"), guards=("accuracy >= 0.5",))
    sizes = Sizes(ladder, setup, factory=None)
    first = first_network(ladder, setup.network.spec)
    assert [spec["standardize"] for spec in (first.spec, *sizes.larger(first.spec).values())] == [statistics] * 2
    raw = dataclasses.replace(config, standardize=False)
    assert "standardize" not in classification_setup(raw, config.student, dataset, 2).network.spec
    assert raw.teacher_config().standardize is False


@pytest.mark.parametrize(
    "statistics",
    [
        {"mean": [0.0] * 2, "scale": [1.0] * 2},
        {"mean": [0.0], "scale": [0.0]},
        {"mean": [float("nan")], "scale": [1.0]},
        {},
    ],
)
def test_damaged_statistics_are_refused(statistics):
    with pytest.raises(InputError, match="standardization needs a finite mean and a positive scale for each of the 3 "):
        students.build({**plain().spec, "standardize": statistics})
