"""A synthetic run on images, and its student exported in every way: fixtures for tests of export and evaluation."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import once

from ev3_distill import students
from ev3_distill.cli.main import main
from ev3_distill.data.sources import load_data
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.students.digests import spec_digest
from ev3_distill.teachers.kinds.flax import forward
from ev3_distill.types import Variables

CLASSES = ["<script>alert(1)</script>", "a|b `c`", "plain"]


WAYS = {
    "onnx": ("--format", "onnx"),
    "onnx-nchw": ("--format", "onnx", "--layout", "nchw", "--softmax", "--teacher-licence", 'MIT: "x"\n# <b>'),
    "stablehlo": ("--format", "stablehlo", "--layout", "nchw"),
    "int8": ("--format", "onnx", "--int8"),
    "flax": ("--latency",),
}


def replace_student(run, network, variables):
    """Puts another student into a run, as if the run's certificate were about it."""
    students.save(run / "student", network, variables)
    certificate = json.loads((run / "certificate.json").read_text())
    certificate |= {"student": tree_digest(variables), "spec": spec_digest(network.spec)}
    (run / "certificate.json").write_text(json.dumps(certificate))


@pytest.fixture(scope="module")
def of_images(finished, tmp_path_factory):
    """A synthetic run of a network and 200 color images as bytes, and its student exported in every way."""

    def make(place):
        run = place / "run"
        shutil.copytree(finished, run)
        rng = np.random.default_rng(0)
        labels = rng.integers(3, size=200)
        images = np.clip(80 * labels[:, None, None, None] + rng.integers(0, 90, (200, 16, 16, 2)), 0, 255)
        np.savez(place / "data.npz", inputs=images.astype(np.uint8), labels=labels, class_names=np.array(CLASSES))
        dataset = load_data(f"npz:{place / 'data.npz'}")
        network = students.from_name("conv4:width=4", (16, 16, 2), 3)
        variables = jax.jit(network.init)(jax.random.key(3))
        larger = jax.tree.map(lambda leaf: leaf * 2 if leaf.ndim > 1 else leaf, variables.params)
        replace_student(run, network, Variables(larger, variables.stats))
        report = json.loads((run / "report.json").read_text())
        report["data"] |= {
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "classes": CLASSES,
            "input_shape": [16, 16, 2],
            "dtype": "uint8",
        }
        report["student"]["network"] = "conv4:width=4"
        names = [
            {**row, "name": name}
            for name, row in zip(CLASSES, report["certificate"]["tables"][0]["rows"][:3], strict=True)
        ]
        report["certificate"]["tables"][0]["rows"] = names
        (run / "report.json").write_text(json.dumps(report))
        given = json.loads((run / "given.json").read_text())
        (run / "given.json").write_text(json.dumps(given | {"fingerprint": dataset.fingerprint}))
        config = (run / "config.toml").read_text()
        (run / "config.toml").write_text(config.replace('data = "digits"', f'data = "npz:{place / "data.npz"}"'))
        for name, options in WAYS.items():
            main(["export", str(run), *options, "--out", str(place / name)])

    return once(tmp_path_factory, "of_images", make)


@pytest.fixture
def images(of_images):
    """100 images and the student's logits."""
    inputs = load_data(f"npz:{of_images / 'data.npz'}").inputs[:100]
    return inputs, forward(*students.load(of_images / "run"))(inputs)


def error_of(answer):
    assert answer.code == 2, answer
    return answer.err
