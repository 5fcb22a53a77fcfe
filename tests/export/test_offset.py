"""Columns near 1.7e9, which float32 does not resolve: of data, students, teachers, new data and exported files."""

import json

import jax
import numpy as np
import onnxruntime
import pytest

from ev3_distill import students
from ev3_distill.config import Compress, Preprocessing
from ev3_distill.data.sources import Dataset
from ev3_distill.teachers import load_teacher
from ev3_distill.teachers.kinds.flax import flax_teacher
from ev3_distill.teachers.teacher import Request
from ev3_distill.training.setup import classification_setup

NOW = 1.7e9
OFFSET = np.array([0, NOW])
TEACHER = """
import numpy as np

def of_raw(x):
    assert x.dtype == np.float64 and (x[:, 1] > 1.6e9).all()
    return of_shifted(x - [0, 1.7e9])

def of_shifted(x):
    score = 4 * (x[:, 0] + x[:, 1])
    return np.stack([-score, score], axis=1)
"""


def examples(n, *, seed, around=0.0):
    """Inputs [n, 2] and labels: noise, and seconds since 1.7e9."""
    rng = np.random.default_rng(seed)
    noise, seconds = rng.normal(size=n), around + rng.normal(size=n)
    return np.stack([noise, seconds], axis=1), (noise + seconds > 0).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data near 1.7e9, the same after a shift by hand, new data, and teachers of both."""
    place = tmp_path_factory.mktemp("offset")
    (place / "time_teachers.py").write_text(TEACHER)
    for name, (inputs, labels) in {"data": examples(800, seed=0), "new": examples(400, seed=1, around=1.0)}.items():
        np.savez(place / f"{name}.npz", inputs=inputs + OFFSET, labels=labels)
        np.savez(place / f"{name}-shifted.npz", inputs=inputs, labels=labels)
    return place


def compress(cli, data, teacher, out):
    answer = cli(
        *(
            "compress",
            "--data",
            f"npz:{data}",
            "--teacher",
            f"python:time_teachers:{teacher}",
            "--student",
            "mlp:hidden=4",
        ),
        *("--arms", "mse", "--budget", 300, "--out", out),
    )
    assert answer.code == 0, answer.err
    return answer, json.loads((out / "report.json").read_text())


def test_a_student_of_times_is_as_good_as_one_of_data_that_were_shifted_by_hand(folder, cli, monkeypatch):
    monkeypatch.chdir(folder)
    answer, report = compress(cli, "data.npz", "of_raw", folder / "run")
    _, by_hand = compress(cli, "data-shifted.npz", "of_shifted", folder / "by-hand")
    assert "subtracting 1700000000 from column 1 first" in answer.err
    assert report["data"]["offset"] == [0, NOW]
    assert "offset" not in by_hand["data"]
    assert report["student"]["accuracy"] >= 0.95
    assert report["student"]["accuracy"] == pytest.approx(by_hand["student"]["accuracy"], abs=0.01)
    network, _ = students.load(folder / "run")
    assert students.offset_of(network.spec).tolist() == [0, NOW]

    # New data are shifted as the run's; those of the run are recognized.
    new = cli("evaluate", folder / "run", "--data", "npz:new.npz")
    assert new.code == 0, new.err
    assert "subtracting" not in new.err
    same = cli("evaluate", folder / "by-hand", "--data", "npz:new-shifted.npz")
    accuracy = [float(one.out.split("accuracy: ")[1].split("%")[0]) for one in (new, same)]
    assert min(accuracy) >= 95
    assert accuracy[0] == pytest.approx(accuracy[1], abs=1)
    known = cli("evaluate", folder / "run", "--data", "npz:data.npz")
    assert known.code == 2
    assert "800 of 800 examples" in known.err

    # So does an exported file, which says what to subtract.
    exported = cli("export", folder / "run", "--format", "onnx", "--out", folder / "out")
    assert exported.code == 0, exported.err
    text = "subtract 1700000000 from column 1 in float64, then convert to float32"
    assert text in exported.out
    assert text in (folder / "out/MODEL_CARD.md").read_text()
    offset = json.loads((folder / "out/model.json").read_text())["data"]["offset"]
    file = cli("evaluate", folder / "out", "--data", "npz:new.npz")
    assert file.code == 0, file.err
    assert float(file.out.split("accuracy: ")[1].split("%")[0]) == accuracy[0]
    with np.load("new.npz") as saved:
        inputs, labels = saved["inputs"], saved["labels"]
    session = onnxruntime.InferenceSession(folder / "out/model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(None, {"inputs": (inputs - offset).astype(np.float32)})[0]
    assert 100 * (logits.argmax(1) == labels).mean() == pytest.approx(accuracy[0], abs=0.1)
    latency = cli("export", folder / "run", "--format", "onnx", "--latency", "--trust-run", "--out", folder / "timed")
    assert latency.code == 0, latency.err
    assert isinstance(json.loads((folder / "timed/evidence.json").read_text())["latency"]["teacher"], dict)
    again = cli("compress", "--resume", folder / "run")
    assert again.code == 0, again.err


@pytest.mark.parametrize("standardize", [True, False])
def test_a_student_records_the_offset_of_its_data_and_hands_it_on(standardize):
    inputs, labels = examples(100, seed=0)
    data = Dataset(
        inputs.astype(np.float32), labels.astype(np.int32), 2, ("0", "1"), None, "x", "0" * 64, offset=OFFSET
    )
    config = Compress(student="mlp:hidden=4", budget="10", standardize=standardize)
    network = classification_setup(config, config.student, data, 2).network
    larger = students.standardized_like(students.from_name("mlp:hidden=8", (2,), 2), network.spec)
    for spec in (network.spec, larger.spec):
        assert students.offset_of(spec).tolist() == [0, NOW]
        assert (spec["standardize"]["mean"] == [0.0]) is not standardize


def test_teachers_get_the_offset_back_before_their_preprocessing(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    inputs, _ = examples(10, seed=2)
    shifted, facts = inputs.astype(np.float32), {"input_shape": (2,), "num_classes": 2, "class_names": ()}
    score = 4 * shifted.sum(1)
    raw = load_teacher("python:time_teachers:of_raw", **facts, offset=OFFSET)
    np.testing.assert_allclose(raw.outputs(shifted)["logits"][:, 1], score, atol=1e-5)
    by_mean = load_teacher(
        "python:time_teachers:of_shifted", **facts, offset=OFFSET, preprocessing=Preprocessing(mean=(NOW,), scale=2.0)
    )
    expected = 4 * ((2.0 * (shifted.astype(np.float64) + OFFSET)) - NOW).sum(1)
    np.testing.assert_allclose(by_mean.outputs(shifted)["logits"][:, 1], expected, rtol=1e-6)


def test_a_network_of_the_same_offset_takes_the_data_as_they_are_and_others_take_their_own():
    plain = students.from_name("mlp:hidden=4", (2,), 2)
    variables = plain.init(jax.random.key(0))
    shifted = examples(10, seed=2)[0].astype(np.float32)
    identity = {"mean": [0.0], "scale": [1.0]}
    of = {
        name: students.standardized(plain, {**identity, **more})
        for name, more in {"none": {}, "same": {"offset": [0, NOW]}, "other": {"offset": [0, NOW - 2]}}.items()
    }
    request = Request("flax:x", Preprocessing(), (2,), 2, (), offset=OFFSET)
    teachers = {name: flax_teacher(network, variables, "flax:x", request) for name, network in of.items()}
    assert {name for name, teacher in teachers.items() if teacher.network is not None} == {"same"}
    for name, inputs in {"same": shifted, "other": shifted + np.array([0, 2]), "none": shifted + OFFSET}.items():
        expected = plain.apply(variables, inputs.astype(np.float32), train=False)[0]
        np.testing.assert_allclose(teachers[name].outputs(shifted)["logits"], expected, rtol=1e-5, atol=1e-5)
