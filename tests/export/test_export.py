"""Exported folders: their files run in other programs, carry their evidence, and can be evaluated again."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import onnx
import pytest
import yaml
from conftest import once
from safetensors import safe_open

from ev3_distill import students
from ev3_distill.cli.main import main
from ev3_distill.data.sources import load_data
from ev3_distill.export import model_file, teacher_latency
from ev3_distill.export.formats.onnx import serialize
from ev3_distill.export.formats.runtime import open_exported
from ev3_distill.search.archive import Entry
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
        students.save(run / "student", network, Variables(larger, variables.stats))
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


def test_folders_hold_the_documented_files(of_images):
    names = {name: sorted(path.name for path in (of_images / name).iterdir()) for name in WAYS}
    assert names["onnx"] == names["int8"] == ["MODEL_CARD.md", "evidence.json", "model.json", "model.onnx"]
    assert names["stablehlo"] == ["MODEL_CARD.md", "evidence.json", "model.json", "model.stablehlo"]
    ours = ["spec.json", "variables"]
    assert names["flax"] == [
        *("MODEL_CARD.md", "apply.stablehlo", "evidence.json", "model.json", "model.safetensors"),
        *ours,
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
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [5, 5]
    assert "This student has at least" in body
    assert ("No certificate covers them" in body) == (name == "int8")


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


def test_evaluate_repeats_the_certificate_for_the_file(finished, cli, here):
    """On the sealed split of its run the claims are those of the certificate; guards are about the file."""
    assert cli("export", finished, "--format", "onnx", "--out", "out").code == 0
    of_run = cli("evaluate", finished, "--guard", "accuracy >= 0.5")
    answer = cli(
        *("evaluate", "out", "--of", finished, "--threads", 1, "--guard", "accuracy >= 0.5"),
        *("--guard", "bytes <= 9000", "--guard", "params <= 1000"),
    )
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert re.fullmatch(r"out/model.onnx: mlp:hidden=8, float32, [\d,]+ bytes, run by onnxruntime [\d.]+", lines[0])
    assert re.fullmatch(
        rf"the student of {finished}: the same answer on 359 of 359 examples, logits differ by at most .*", lines[1]
    )
    timed = [("", 1), ("", 64), (" of the teacher", 1), (" of the teacher", 64)]
    for line, (whose, size) in zip(lines[2:6], timed, strict=True):
        assert re.fullmatch(rf"latency{whose} at batch {size}: \S+ ms p50, \S+ ms p99, 1 thread, \d+ passes", line)
    assert lines[6:8] == of_run.out.splitlines()
    assert lines[8] == f"Guard bytes <= 9000: certified, {(here / 'out/model.onnx').stat().st_size:,} bytes"
    rest = load_data("digits")
    np.savez(here / "rest.npz", inputs=rest.inputs[:100], labels=rest.labels[:100])
    other = cli("evaluate", "out/model.onnx", "--data", "npz:rest.npz", "--guard", "accuracy >= 0.999")
    assert other.code == 3
    assert re.search(r"^accuracy: [\d.]+% of 100 examples; at least [\d.]+% with 95% confidence$", other.out, re.M)
    assert "NOT CERTIFIED" in other.out
    assert "the student of" not in other.out


@pytest.mark.parametrize("name", ["stablehlo", "flax"])
def test_evaluate_runs_stablehlo_and_flax_files(name, of_images, cli):
    answer = cli("evaluate", of_images / name, "--data", f"npz:{of_images / 'data.npz'}", "--of", of_images / "run")
    assert answer.code == 0, answer.err
    assert "contains the examples that the student was trained on" in answer.err
    assert "the same answer on 200 of 200 examples" in answer.out
    assert "float32, " in answer.out
    assert "run by jax " in answer.out
    assert "latency of the teacher: " in answer.out


@pytest.mark.parametrize("kind", ["python", "onnx", "logits", "gone"])
def test_teachers_are_timed_if_they_can_run(kind, finished, of_images, here):
    """In a subprocess with the requested number of cores."""
    shutil.copytree(finished, here / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (here / "of_mine.py").write_text(
        "import os\nimport numpy as np\n\n\ndef logits(x):\n    print('chatter')\n"
        "    assert len(os.sched_getaffinity(0)) == 1\n    return np.zeros((len(x), 3))\n"
    )
    names = {"python": "python:of_mine:logits", "onnx": f"onnx:{of_images / 'onnx/model.onnx'}"}
    teacher = names.get(kind, f"{'onnx' if kind == 'gone' else kind}:gone.{kind}")
    config = (here / "run/config.toml").read_text()
    (here / "run/config.toml").write_text(config.replace('teacher = ""', f'teacher = "{teacher}"', 1))
    dataset = load_data(f"npz:{of_images / 'data.npz'}")
    times = teacher_latency.measure_teacher(here / "run", dataset, dataset.inputs[:5], batch_sizes=(1, 8), threads=1)
    if kind == "logits":
        assert times == "it cannot be timed, its logits were recorded (logits:gone.logits)"
    elif kind == "gone":
        assert "gone.gone" in times
    else:
        assert isinstance(times, dict), times
        assert list(times) == [1, 8]
        assert all(3 <= len(of) <= 301 and (of > 0).all() for of in times.values())


def error_of(answer):
    assert answer.code == 2, answer
    return answer.err


def test_damaged_and_foreign_files_are_refused(of_images, cli, here):
    data = ("--data", f"npz:{of_images / 'data.npz'}")
    content = bytearray((of_images / "onnx/model.onnx").read_bytes())
    (here / "cut.onnx").write_bytes(content[:700])
    assert "cut.onnx fails with " in error_of(cli("evaluate", "cut.onnx", *data))
    (here / "noise.stablehlo").write_bytes(b"\0" * 100)
    assert "noise.stablehlo fails with " in error_of(cli("evaluate", "noise.stablehlo", *data))
    assert "gone.onnx, which is missing or not a file" in error_of(cli("evaluate", "gone.onnx", *data))
    model = onnx.load(of_images / "onnx/model.onnx")
    del model.metadata_props[:]
    onnx.save(model, here / "foreign.onnx")
    assert "needs its metadata; foreign.onnx lacks format, precision" in error_of(
        cli("evaluate", "foreign.onnx", *data)
    )
    variables = (of_images / "flax/model.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(variables[:700])
    assert "exported variables need their program beside them; apply.stablehlo is missing" in error_of(
        cli("evaluate", "cut.safetensors", *data)
    )
    shutil.copy(of_images / "flax/apply.stablehlo", here)
    assert "cut.safetensors fails with SafetensorError" in error_of(cli("evaluate", "cut.safetensors", *data))
    shutil.copytree(of_images / "flax", here / "variables")
    with (here / "variables/apply.stablehlo").open("ab") as file:
        file.write(b"x")
    assert "apply.stablehlo was changed or damaged" in error_of(cli("evaluate", "variables/apply.stablehlo", *data))
    shutil.copytree(of_images / "onnx", here / "flipped")
    content[content.index(b"inputs") + 600] ^= 1
    (here / "flipped/model.onnx").write_bytes(content)
    assert "was changed or damaged" in error_of(cli("evaluate", "flipped", *data))


def test_impossible_evaluations_are_refused(of_images, finished, cli, here):
    file, data = of_images / "onnx", ("--data", f"npz:{of_images / 'data.npz'}")
    assert "name data with --data, or the run of the file with --of RUN" in error_of(cli("evaluate", file))
    assert "a guard on agreement needs the teacher" in error_of(
        cli("evaluate", file, *data, "--guard", "agreement >= 0.5")
    )
    assert "a guard on worst_group_accuracy needs groups" in error_of(
        cli("evaluate", file, *data, "--guard", "worst_group_accuracy >= 0.5")
    )
    assert "has no student" in error_of(cli("evaluate", file, *data, "--of", finished))
    assert "the student takes inputs of shape [16, 16, 2]" in error_of(cli("evaluate", file, "--data", "digits"))
    assert "--of and --threads are about an exported file" in error_of(cli("evaluate", finished, "--threads", 1))
    (here / "old").mkdir()
    (here / "old/evidence.json").write_text("{}")
    assert "is an export of an older version, without a file" in error_of(cli("evaluate", "old", *data))
    assert "try 0.95" in error_of(cli("evaluate", file, *data, "--confidence", 2))
    np.savez(here / "real.npz", inputs=np.zeros((9, 16, 16, 2), np.float32), labels=np.arange(9) % 3)
    assert "inputs of the dtype of its run's data, uint8" in error_of(cli("evaluate", file, "--data", "npz:real.npz"))


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
    students.save(here / "run/student", network, network.init(jax.random.key(0)))
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
    entry = Entry(2, "mlp:hidden=2", dict(network.spec), 1035, "", "begun", 9, 50, 0.5, 0.4, 0, 0.0, False)
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
    assert "Parameters: 1,035\n" in card
    assert "at least" not in card
    assert "model-index" not in card
    with open_exported(here / "out/model.onnx") as file:
        assert (file.metadata.params, file.metadata.certificate) == (1035, {})
        assert file.metadata.promise == "No certificate covers this student"
    scored = cli("evaluate", "out", "--of", run, "--data", f"npz:{of_images / 'data.npz'}")
    assert scored.code == 0, scored.err
    assert f"the student of {run}: the same answer on 200 of 200 examples" in scored.out
    refused = cli("evaluate", "out", "--of", run)
    assert "a sealed split certifies only the students that it was opened for" in error_of(refused)


def test_a_taught_network_can_be_exported(finished, cli, here):
    assert cli("export", finished / "teacher", "--format", "stablehlo", "--out", "out").code == 0
    card = (here / "out/MODEL_CARD.md").read_text()
    assert "Teacher: labels" in card
    assert "library_name: jax" in card
