"""An exported file is accepted only if its outputs equal the student's, up to the tolerance of its precision."""

import json

import numpy as np
import pytest

from ev3_distill.errors import InputError
from ev3_distill.export import ExportConfig, acceptance, export_run
from ev3_distill.export.formats import onnx_static_quantization
from ev3_distill.tasks.classification.task import classification


@pytest.mark.parametrize(
    ("precision", "difference", "agreement", "real_data", "accepted"),
    [
        ("float32", 0.7e-4, 0.5, True, True),
        ("float32", 1.5e-4, 1.0, True, False),
        ("float32", np.inf, 1.0, True, False),
        ("int8", 0.15, 0.92, True, True),
        ("int8", 0.3, 1.0, True, False),
        ("int8", 0.15, 0.85, True, False),
        ("int8", 0.15, 0.85, False, True),  # random inputs say nothing about the agreement
    ],
)
def test_tolerances_by_precision(precision, difference, agreement, real_data, accepted):
    comparison = {"examples": 10, "difference": difference, "agreement": agreement}
    if accepted:
        acceptance.check_accepted(comparison, format="onnx", precision=precision, real_data=real_data)
        return
    with pytest.raises(InputError, match="the outputs of an exported file must equal the student's"):
        acceptance.check_accepted(comparison, format="onnx", precision=precision, real_data=real_data)


def test_difference_is_relative_to_the_largest_output(monkeypatch):
    """Below 1 it is absolute; outputs that are not finite are infinitely different."""
    task = classification(2)

    def compared(outputs, expected):
        monkeypatch.setattr(acceptance, "run_file", lambda path, inputs: np.array(outputs))
        comparison = acceptance.compare(
            "file", lambda inputs: np.array(expected), np.zeros((1, 3)), task=task, output="logits"
        )
        return comparison["difference"], comparison["agreement"]

    np.testing.assert_allclose(compared([[9.0, 2.0]], [[10.0, 2.0]]), (0.1, 1))
    np.testing.assert_allclose(compared([[0.5, 0.2]], [[0.4, 0.2]]), (0.1, 1))
    np.testing.assert_allclose(compared([[0.2, 0.5]], [[0.5, 0.2]]), (0.3, 0))
    assert compared([[np.nan, 0.2]], [[0.4, 0.2]]) == (np.inf, 0)


def test_the_task_decides_which_answers_are_the_same(monkeypatch):
    """Here the answer is the sign of the first output."""
    monkeypatch.setattr(acceptance, "run_file", lambda path, inputs: np.array([[3.0, 9.0], [-1.0, 0.0]]))

    class Signs:
        @staticmethod
        def same_answer(one, other):
            return np.sign(one[:, 0]) == np.sign(other[:, 0])

    expected = np.array([[2.0, 1.0], [1.0, 0.0]])
    comparison = acceptance.compare("file", lambda _: expected, np.zeros((2, 3)), task=Signs, output="logits")
    assert comparison["agreement"] == 0.5


def test_mean_score_counts_only_examples_with_a_target():
    outputs = np.array([[2.0, 1.0], [0.0, 1.0], [5.0, 1.0], [5.0, 1.0]], np.float32)
    assert acceptance.mean_score(classification(2), outputs, np.array([0, 1, 1, -1], np.int32)) == 2 / 3


def test_int8_is_calibrated_on_512_examples(finished, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    counts, quantize = [], onnx_static_quantization.quantize

    def counted(model, inputs, *args, **options):
        counts.append(len(inputs))
        return quantize(model, inputs, *args, **options)

    monkeypatch.setattr(onnx_static_quantization, "quantize", counted)
    export_run(finished, tmp_path / "out", ExportConfig("onnx", int8=True))
    assert counts == [512]


def test_runs_of_other_tasks_are_neither_exported_nor_evaluated(finished, here, cli):
    """Such a run would be judged by its largest logit, whatever its outputs mean."""
    path = finished / "report.json"
    content = json.loads(path.read_text())
    assert content["task"] == "classification"
    path.write_text(json.dumps(content | {"task": "regression"}))
    try:
        for command in (("export", finished, "--format", "onnx", "--out", "file"), ("evaluate", finished)):
            result = cli(*command)
            assert result.code == 2 and "this run's task is 'regression'" in result.err
        assert not (here / "file").exists()
        path.write_text(json.dumps({name: value for name, value in content.items() if name != "task"}))
        assert cli("evaluate", finished).code == 0  # made before reports named their task
    finally:
        path.write_text(json.dumps(content, indent=1) + "\n")
