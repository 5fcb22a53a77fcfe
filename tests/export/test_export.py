"""Exported folders: their files run in other programs, carry their evidence, and can be evaluated again."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import exported_runs
import jax
import numpy as np
import onnx
import pytest
import yaml
from exported_runs import CLASSES, WAYS, error_of
from safetensors import safe_open

from ev3_distill import students
from ev3_distill.export import model_file
from ev3_distill.export.formats.onnx import serialize
from ev3_distill.export.formats.runtime import open_exported
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.search.archive import Entry
from ev3_distill.teachers.kinds.flax import forward

images, of_images = exported_runs.images, exported_runs.of_images  # fixtures


def test_folders_hold_the_documented_files(of_images):
    names = {name: sorted(path.name for path in (of_images / name).iterdir()) for name in WAYS}
    documents = ["MODEL_CARD.md", "evidence.json", "model.json"]
    assert names["onnx"] == names["int8"] == [*documents, "model.onnx", "seen_rows.npz"]
    assert names["stablehlo"] == [*documents, "model.stablehlo", "seen_rows.npz"]
    assert names["flax"] == [
        *("MODEL_CARD.md", "apply.stablehlo", "digest.json", "evidence.json", "model.json", "model.safetensors"),
        *("seen_rows.npz", "spec.json", "variables"),
    ]
    assert not list(of_images.glob(".*"))


@pytest.mark.parametrize("name", ["onnx", "onnx-nchw", "stablehlo", "flax"])
def test_files_take_the_inputs_of_the_data_set(name, of_images, images):
    inputs, logits = images
    assert len(np.unique(logits.argmax(axis=1))) == 3
    with open_exported(next((of_images / name).glob("model.[os]*")), threads=1) as file:
        outputs, passes = file.outputs(inputs), file.passes_ms(inputs[:1], 5)
    assert passes.shape == (5,)
    assert (passes > 0).all()
    expected = jax.nn.softmax(logits) if name == "onnx-nchw" else logits
    np.testing.assert_allclose(outputs, expected, atol=1e-4)


@pytest.mark.parametrize("name", WAYS)
def test_the_code_in_the_card_runs(name, of_images):
    """It runs without this package."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (of_images / name / "MODEL_CARD.md").read_text(), re.S | re.M)
    assert len(block.splitlines()) == 5
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=of_images / name, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shape = (1, 16, 16, 2)
    black = forward(*students.load(of_images / "run"))(np.zeros(shape, np.uint8)).argmax(axis=1)
    assert done.stdout == f"{black}\n"
    assert "students" not in block


@pytest.mark.parametrize("name", WAYS)
def test_cards_escape_names_that_users_chose(name, of_images):
    text = (of_images / name / "MODEL_CARD.md").read_text()
    _, front, body = text.split("---\n", 2)
    front_matter = yaml.safe_load(front)
    assert front_matter["license"] == (WAYS[name][-1] if name == "onnx-nchw" else "unknown")
    assert front_matter["datasets"] == [f"npz:{of_images / 'data.npz'}"]
    assert ("model-index" in front_matter) == (name != "int8")
    assert "<script>" not in body
    assert "<b>" not in body
    rows = [line for line in body.splitlines() if re.match(r"\| (&lt;script|a\\\|b)", line)]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == ([] if name == "int8" else [5, 5])
    assert ("This student has at least" in body) == (name != "int8")
    assert ("No certificate covers these int8 weights" in body) == (name == "int8")


def test_files_and_folders_carry_the_evidence(of_images, finished):
    evidence = json.loads((of_images / "onnx/evidence.json").read_text())
    assert (
        evidence["certificate"]["claims"] == json.loads((finished / "report.json").read_text())["certificate"]["claims"]
    )
    assert evidence["export"]["difference"] < 1e-5
    assert evidence["export"]["agreement"] == 1
    assert evidence["export"]["examples"] == 100  # of explore
    props = {prop.key: prop.value for prop in onnx.load(of_images / "onnx/model.onnx").metadata_props}
    assert json.loads(props["classes"]) == CLASSES
    assert props["promise"].startswith("This student has at least")
    assert json.loads(props["certificate"])["claims"] == evidence["certificate"]["claims"]
    assert json.loads(props["teacher"])["licence"] == "unknown"
    assert json.loads(props["versions"])["onnx"] == onnx.__version__
    beside = json.loads((of_images / "stablehlo/model.json").read_text())
    assert (beside["layout"], beside["output"], beside["dtype"]) == ("nchw", "logits", "uint8")
    flax = json.loads((of_images / "flax/evidence.json").read_text())
    assert list(flax) == ["certificate", "guards", "export", "latency"]
    assert (flax["export"]["agreement"], flax["export"]["examples"]) == (1, 100)
    with safe_open(of_images / "flax/model.safetensors", framework="numpy") as file:
        header = file.metadata()
    assert json.loads(header["classes"]) == CLASSES
    assert header["promise"].startswith("This student has at least")
    assert json.loads(header["certificate"])["claims"] == evidence["certificate"]["claims"]
    assert {"jax", "flax"} <= json.loads(header["versions"]).keys()
    assert json.loads(header["teacher"])["licence"] == "unknown"
    assert json.loads(header["statistics"])[0] == "norms.0.mean"


def test_latency_is_in_the_card_if_requested(of_images):
    """The teacher here takes 8x8 digits and not the run's images; the card gives that as the reason."""
    content = json.loads((of_images / "flax/evidence.json").read_text())["latency"]
    assert {size: row["passes"] for size, row in content["file"].items()} == {"1": 301, "64": 100}
    assert 0 < content["file"]["1"]["p50"] <= content["file"]["1"]["p99"]
    card = (of_images / "flax/MODEL_CARD.md").read_text()
    assert re.search(r"^\| this file \| 64 \| [\d.]+ \| [\d.]+ \| 100 \|$", card, re.M)
    assert f"Milliseconds on {content['threads']} thread" in card
    assert "Not measured for the teacher: " in card
    assert "Latency" not in (of_images / "onnx/MODEL_CARD.md").read_text()


def test_int8_files_hold_int8_weights_and_their_cost(of_images, images, cli):
    model = onnx.load(of_images / "int8/model.onnx")
    scales = [onnx.numpy_helper.to_array(part) for part in model.graph.initializer if part.name.endswith("_scale")]
    kernels = [onnx.numpy_helper.to_array(part) for part in model.graph.initializer if len(part.dims) == 4]
    assert [(kernel.dtype, kernel.shape[0]) for kernel in kernels] == [("int8", 4)] * 4
    assert np.abs(np.concatenate([kernel.ravel() for kernel in kernels]).astype(int)).max() <= 64  # 7 bits
    assert sum(scale.shape == (4,) for scale in scales) >= 4  # one for each channel
    content = json.loads((of_images / "int8/evidence.json").read_text())["export"]
    assert content["precision"] == "int8"
    assert content["data"] == "decide"
    assert 0 < content["difference"] < 0.2
    assert content["agreement"] > 0.9
    assert {"accuracy", "accuracy_float32", "bytes", "bytes_float32"} <= content.keys()
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert props["promise"] == "No certificate covers these int8 weights, only the float32 student that they come from"
    assert json.loads(props["certificate"]) == {}
    refused = cli("evaluate", of_images / "int8", "--of", of_images / "run")
    assert refused.code == 2
    assert "a sealed split certifies one student, and files that compute the same; " in refused.err
    assert "has int8 weights and gives the same answer on" in refused.err


def test_a_file_with_other_outputs_is_deleted(finished, cli, here, monkeypatch):
    def other(function, example, **facts):
        return serialize(lambda x: function(x) + 1e-2, example, **facts)

    monkeypatch.setattr(model_file.onnx, "serialize", other)
    answer = cli("export", finished, "--format", "onnx", "--out", "out")
    assert answer.code == 2
    assert re.search(
        r"this onnx file differs by [\d.e-]+ of the largest output on 898 examples, 0.0001 is allowed", answer.err
    )
    assert "it was deleted" in answer.err
    assert list(here.iterdir()) == []


def test_without_the_data_the_file_is_checked_on_random_inputs(of_images, cli, here):
    run = here / "run"
    shutil.copytree(of_images / "run", run)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r'data = "npz:.*"', 'data = "npz:gone.npz"', config))
    assert cli("export", run, "--format", "onnx", "--out", "out").code == 0
    checked = json.loads((here / "out/evidence.json").read_text())["export"]
    assert (checked["data"], checked["examples"]) == ("random", 1000)
    assert "1,000 random inputs" in (here / "out/MODEL_CARD.md").read_text()
    answer = cli("export", run, "--format", "onnx", "--int8", "--out", "int8")
    assert answer.code == 2
    assert "--int8 needs examples of the explore split to calibrate on; the data" in answer.err
    report = json.loads((run / "report.json").read_text())
    del report["data"]["dtype"]
    (run / "report.json").write_text(json.dumps(report))
    answer = cli("export", run, "--format", "stablehlo", "--out", "old")
    assert "this run is older than its record in report.json" in answer.err
    assert sorted(path.name for path in here.iterdir()) == ["out", "run"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--format", "tflite"), "an export's format is one of flax, onnx, stablehlo; got 'tflite'"),
        (("--format", "onnx", "--layout", "hwc"), "an export's layout is nhwc or nchw; got 'hwc'"),
        (("--softmax",), "add --format onnx or stablehlo"),
        (("--format", "stablehlo", "--int8"), "--int8 writes an ONNX file; got --format stablehlo"),
        (("--format", "onnx", "--pick", "params<=3"), "--pick needs a run of a search"),
    ],
)
def test_invalid_export_options_are_refused(options, says, finished, cli, here):
    assert says in error_of(cli("export", finished, *options, "--out", "x"))
    assert list(here.iterdir()) == []


def test_unfinished_runs_and_existing_folders_are_refused(finished, cli, here):
    (here / "there").mkdir()
    assert "export writes a new folder; there exists" in error_of(
        cli("export", finished, "--format", "onnx", "--out", "there")
    )
    assert "export needs a finished run" in error_of(cli("export", here, "--format", "onnx", "--out", "x"))


def test_exporting_a_users_network_needs_its_factory(finished, cli, here):
    """An operation that the ONNX export lacks is named, with formats that can hold it."""
    (here / "mine.py").write_text(
        "import jax.numpy as jnp\nfrom flax import nnx\n\n\nclass Sums(nnx.Module):\n"
        "    def __init__(self, shape, classes, rngs):\n        self.head = nnx.Linear(64, classes, rngs=rngs)\n\n"
        "    def __call__(self, x):\n        return self.head(jnp.cumsum(x.reshape(x.shape[0], -1), axis=1))\n\n\n"
        "def make(input_shape, num_classes, rngs):\n    return Sums(input_shape, num_classes, rngs)\n"
    )
    shutil.copytree(finished, here / "run")
    factory = students.import_factory("mine:make")
    network = students.from_name("mine:make", (8, 8, 1), 10)
    exported_runs.replace_student(here / "run", network, network.init(jax.random.key(0)))
    report = json.loads((here / "run/report.json").read_text())
    report["student"]["network"] = "mine:make"
    (here / "run/report.json").write_text(json.dumps(report))
    assert factory is not None
    assert "pass the callable as factory=" in error_of(cli("export", "run", "--format", "onnx", "--out", "x"))
    answer = cli("export", "run", "--format", "onnx", "--student", "mine:make", "--out", "x")
    assert "the network mine:make uses the primitive cumsum: " in error_of(answer)
    assert "use --format stablehlo or flax instead" in answer.err
    assert cli("export", "run", "--format", "stablehlo", "--student", "mine:make", "--out", "x").code == 0


def test_a_picked_student_is_exported_without_certificate(of_images, cli, here):
    """Neither its file nor its card repeats the certificate of the delivered student."""
    run, network = here / "run", students.from_name("mlp:hidden=2", (16, 16, 2), 3)
    shutil.copytree(of_images / "run", run)
    variables = jax.jit(network.init)(jax.random.key(0))
    students.save(run / "sizes/02/student", network, variables)
    entry = Entry(
        2, "mlp:hidden=2", dict(network.spec), 1035, tree_digest(variables), "begun", 9, 50, 0.5, 0.4, 0, 0.0, False
    )
    (run / "archive.json").write_text(json.dumps({"entries": [dataclasses.asdict(entry)]}))
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | {"search": {"delivered": 1}}))
    answer = cli("export", run, "--format", "onnx", "--pick", "params<=2000", "--out", "out")
    assert answer.code == 0, answer.err
    assert "student 2, mlp:hidden=2, 1,035 parameters: 50.0% on decide" in answer.out
    evidence = json.loads((here / "out/evidence.json").read_text())
    assert list(evidence) == ["decide", "export"]
    card = (here / "out/MODEL_CARD.md").read_text()
    assert "No certificate covers this student" in card
    assert "On decide: 50.0 % of 50 examples correct" in card
    assert "Parameters: 1,035; its teacher has" in card
    assert "at least" not in card
    assert "model-index" not in card
    with open_exported(here / "out/model.onnx") as file:
        assert (file.metadata.params, file.metadata.certificate) == (1035, {})
        assert file.metadata.promise.startswith("No certificate covers this student: it was selected among several")
    scored = cli("evaluate", "out", "--of", run, "--data", f"npz:{of_images / 'data.npz'}", "--keep-overlap")
    assert scored.code == 3, scored.err
    assert f"the student of {run}: the same answer on 200 of 200 examples" in scored.out
    refused = cli("evaluate", "out", "--of", run)
    assert "a sealed split certifies only the students that it was opened for" in error_of(refused)


def test_a_taught_network_can_be_exported(finished, cli, here):
    assert cli("export", finished / "teacher", "--format", "stablehlo", "--out", "out").code == 0
    card = (here / "out/MODEL_CARD.md").read_text()
    assert "Teacher: labels" in card
    assert "library_name: jax" in card
