"""The certificate stands in the files that it is about, and nowhere else; int8 files with other answers are not delivered."""

import dataclasses
import itertools
import json
import shutil

import exported_runs
import jax
import numpy as np
import pytest

from ev3_distill import students
from ev3_distill.errors import RequirementError
from ev3_distill.export import ExportConfig, acceptance, export, export_run
from ev3_distill.export.formats import onnx_static_quantization
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.search.archive import Entry

FORMATS = {
    "flax": {},
    "stablehlo": {"format": "stablehlo"},
    "stablehlo softmax": {"format": "stablehlo", "softmax": True, "layout": "nchw"},
    "onnx": {"format": "onnx"},
    "onnx softmax": {"format": "onnx", "softmax": True},
    "onnx int8": {"format": "onnx", "int8": True},
    "onnx softmax int8": {"format": "onnx", "softmax": True, "int8": True},
}
DELIVERED = "bound<=0.15"  # picks the delivered student
CASES = [
    (name, precision, pick)
    for name, precision, pick in itertools.product(FORMATS, ("float32", "int8"), ("", "params<=100000", DELIVERED))
    if not ("int8" in name and precision == "int8")  # refused
]


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Runs of a search that delivered size 1, in float32 and int8; decide prefers size 2. Latency and bytes are claimed."""
    place = tmp_path_factory.mktemp("runs")
    for precision in ("float32", "int8"):
        run = shutil.copytree(finished, place / precision)
        network = students.from_name("mlp:hidden=8", (8, 8, 1), 10)
        network = students.with_precision(network, precision)
        one, other = (network.init(jax.random.key(seed)) for seed in (0, 1))
        exported_runs.replace_student(run, network, one)
        students.save(run / "sizes/02/student", network, other)
        entries = [
            Entry(
                i, "mlp:hidden=8", dict(network.spec), 610, tree_digest(of), "begun", 9, 50, 0.5, i / 10, 0, 0.0, False
            )
            for i, of in ((1, one), (2, other))
        ]
        (run / "archive.json").write_text(json.dumps({"entries": [dataclasses.asdict(entry) for entry in entries]}))
        extra = [{"metric": "latency_ms", "point": 1.0, "upper_bound": 2.0, "n": 301}]
        guards = [
            {"guard": f"{metric} <= 9", "metric": metric, "point": 1.0, "bound": 1.0, "certified": True}
            for metric in ("latency_ms", "bytes", "params")
        ]
        for name in ("certificate.json", "report.json"):
            content = json.loads((run / name).read_text())
            certificate = content if name == "certificate.json" else content["certificate"]
            certificate["claims"] += extra
            content |= {"guards": guards, "search": {"delivered": 1}} if name == "report.json" else {}
            (run / name).write_text(json.dumps(content))
    return place


@pytest.mark.parametrize(("name", "precision", "pick"), CASES)
def test_the_certificate_stands_only_in_files_that_it_is_about(name, precision, pick, runs, here, monkeypatch):
    """A file of other weights, of another arithmetic or of another student repeats none of it. Nothing is compiled."""
    embedded = []

    def write_model(folder, network, variables, config, about):
        path = folder / f"model.{config.format}"
        path.write_bytes(b"program")
        embedded.append(about.as_texts())
        (folder / "model.json").write_text(json.dumps(about.as_sidecar(sha256="")))
        return path

    def quantize(model, inputs, scratch, *, metadata):
        embedded.append(metadata)
        return b"quantized"

    monkeypatch.setattr(export, "write_model", write_model)
    monkeypatch.setattr(onnx_static_quantization, "quantize", quantize)
    monkeypatch.setattr(acceptance, "run_file", lambda path, inputs: np.ones((len(inputs), 10)))
    monkeypatch.setattr(export, "run_file", acceptance.run_file)
    same = {"examples": 9, "difference": 0.0, "agreement": 1.0}
    monkeypatch.setattr(export, "compare", lambda *args, **options: same)
    lines = export_run(runs / precision, here / "out", ExportConfig(**FORMATS[name], pick=pick))
    covered = precision == "float32" and "int8" not in name and pick in ("", DELIVERED)
    assert ("no certificate covers" in "\n".join(lines).lower()) == (not covered)
    card = (here / "out/MODEL_CARD.md").read_text()
    sidecar, evidence = (json.loads((here / f"out/{file}.json").read_text()) for file in ("model", "evidence"))
    assert ("certificate" in evidence) == covered
    for promise, certificate in (
        (sidecar["promise"], sidecar["certificate"]),
        (embedded[-1]["promise"], json.loads(embedded[-1]["certificate"])),
    ):
        assert promise.startswith("This student has at least" if covered else "No certificate covers ")
        assert [claim["metric"] for claim in certificate.get("claims", [])] == (["accuracy", "agreement"] * covered)
    front, body = card.split("---\n", 2)[1:]
    for sign in ("at least", "% confidence", "Guard params", "accuracy by class", "Not covered:"):
        assert (sign.lower() in body.lower()) == covered, sign
    assert ("No certificate covers" in body) == (not covered)
    assert ("model-index" in front) == covered
    assert "latency" not in card.lower().replace(r"latency\_ms: other machines", "")  # of the student, not of this file
    assert "Guard bytes" not in card


def spoiled(variables):
    """The same function, with one hidden unit of enormous range that the output ignores: int8 rounds all other units to 0."""
    layers = variables.params["layers"]
    first, last = layers[0], layers[1]
    first = {"kernel": first["kernel"].at[:, 0].mul(1e6), "bias": first["bias"].at[0].set(1e6)}
    last = {**last, "kernel": last["kernel"].at[0].set(0.0)}
    return variables._replace(params={**variables.params, "layers": {**layers, 0: first, 1: last}})


def test_int8_files_with_other_answers_are_not_delivered(finished, cli, here):
    pytest.importorskip("onnxruntime")
    run = shutil.copytree(finished, here / "run")
    network, variables = students.load(run)
    exported_runs.replace_student(run, network, spoiled(variables))
    answer = cli("export", run, "--format", "onnx", "--int8", "--out", "out")
    assert answer.code == 3, answer.err
    assert (
        "an int8 file must give its student's answer on at least 90% of the examples; this one does on " in answer.err
    )
    assert not (here / "out").exists() and [path.name for path in here.iterdir()] == ["run"]
    assert cli("export", run, "--format", "onnx", "--out", "out").code == 0


@pytest.mark.parametrize(("agreement", "accepted"), [(0.316, False), (0.899, False), (0.9, True), (1.0, True)])
def test_both_ways_to_int8_demand_the_same_agreement(agreement, accepted):
    comparison = {"examples": 1000, "difference": 0.1, "agreement": agreement}
    for check in (
        acceptance.check_quantized,
        lambda of: acceptance.check_accepted(of, format="onnx", precision="int8", real_data=True),
    ):
        if accepted:
            check(comparison)
        else:
            with pytest.raises((RequirementError, ValueError), match=r"the same answer|the examples; this one"):
                check(comparison)
