"""A warning names a useless student before the sealed split is opened, and so do the report, its page and the model card."""

import copy
import json
import types

import numpy as np
import pytest
from report_examples import make_report, make_rows

from ev3_distill.config import Compress
from ev3_distill.data.sources import Dataset
from ev3_distill.guards import parse
from ev3_distill.monitor import report as report_page
from ev3_distill.tasks.classification.task import classification
from ev3_distill.tasks.outputs import Outputs
from ev3_distill.training import usefulness_checks as checks

NAMES = ("cat", "dog", "horse")
LABELS = np.repeat([0, 1, 2], [60, 30, 30]).astype(np.int32)
LEDGER = [{"cost": 100 * i, "current_accuracy": 0.5} for i in range(1, 10)]


def logits_of(classes):
    return 5 * np.eye(3, dtype=np.float32)[np.asarray(classes)]


def setup_of(inputs=None, labels=LABELS, guards=()):
    inputs = np.random.default_rng(0).normal(size=(len(labels), 4)).astype(np.float32) if inputs is None else inputs
    rows = {name: np.arange(len(labels)) for name in ("explore", "assess", "decide", "test")}
    return types.SimpleNamespace(
        task=classification(3),
        dataset=Dataset(inputs, labels, 3, NAMES, None, "npz:data.npz", "0"),
        rows=rows,
        guards=[parse(text) for text in guards],
        class_names=list(NAMES),
    )


def content_of(here, student, teacher=None, setup=None, config=None, certified=True, rows=LEDGER):
    setup = setup or setup_of()
    (here / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = Outputs(
        logits_of(student), setup.dataset.labels, None if teacher is None else {"logits": logits_of(teacher)}
    )
    guards = [{"metric": guard.metric, "certified": certified} for guard in setup.guards]
    certification = types.SimpleNamespace(outputs=outputs, guards=guards)
    return checks.usefulness_content(here, config or Compress(), setup, certification)


def test_a_student_that_predicts_one_class_is_told_with_its_name(tmp_path):
    content = content_of(tmp_path, np.full(120, 1), LABELS)
    assert content["alarm"] == "one class"
    assert content["message"] == "The student is useless: it predicts 'dog' for all 120 examples of the sealed split"
    assert content["constant"] == 0.5
    json.dumps(content)


def test_a_good_student_raises_no_alarm(tmp_path):
    content = content_of(tmp_path, LABELS, LABELS)
    assert (content["alarm"], content["message"], content["causes"]) == ("", "", [])


def test_causes_name_the_teacher_the_scale_of_inputs_and_the_budget(tmp_path):
    shuffled = np.random.default_rng(0).permutation(LABELS)
    rising = [{"cost": 100 * i, "current_accuracy": 0.1 * i} for i in range(1, 10)]
    raw = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32) * [1, 1000, 1, 0.001]
    setup = setup_of(raw.astype(np.float32))
    content = content_of(tmp_path, shuffled, shuffled, setup, Compress(standardize=False), rows=rising)
    assert content["alarm"] == "constant"
    teacher, scale, budget = content["causes"]
    assert teacher.startswith("the teacher is no better, with ")
    assert scale == "columns of the inputs have very different scales, or large ones: omit --no-standardize"
    assert budget.startswith("the budget of 20000 is too small, the student was still improving")
    level = [{"cost": 100 * i, "current_accuracy": 0.5, "final": False} for i in range(1, 10)]
    learned = [{"cost": 900 + 100 * i, "current_accuracy": 1.0, "final": True} for i in range(1, 4)]
    content = content_of(
        tmp_path, shuffled, LABELS, setup, rows=[*level, *learned]
    )  # a score on learned rows is no rise
    assert content["causes"] == [
        "the inputs may say little about the classes, or the student is too small: compare a teacher's accuracy, try a larger "
        "--student or --budget"
    ]


def test_a_certified_guard_on_quality_accepts_a_student_far_below_its_teacher(tmp_path):
    rng = np.random.default_rng(0)
    weak = np.where(rng.random(120) < 0.35, LABELS, 0)
    assert content_of(tmp_path, weak, LABELS)["alarm"] == "teacher"
    assert content_of(tmp_path, weak, LABELS, setup_of(guards=["accuracy >= 0.4"]))["alarm"] == ""
    assert (
        content_of(tmp_path, weak, LABELS, setup_of(guards=["accuracy >= 0.4"]), certified=False)["alarm"] == "teacher"
    )
    assert content_of(tmp_path, weak, LABELS, setup_of(guards=["bytes <= 9000"]))["alarm"] == "teacher"


def test_without_labels_the_teachers_classes_stand_in(tmp_path):
    setup = setup_of(labels=np.full(120, -1, np.int32))
    content = content_of(tmp_path, np.zeros(120, int), LABELS, setup)
    assert content["message"].startswith("The student is useless: it predicts 'cat' for all 120 examples")
    assert content_of(tmp_path, LABELS, LABELS, setup)["alarm"] == ""
    weak = np.where(np.random.default_rng(0).random(120) < 0.35, LABELS, 0)
    message = content_of(tmp_path, weak, LABELS, setup)["message"]
    assert message.startswith("The student is far below its teacher: it gives its teacher's answer on ")
    assert message.endswith("% of the sealed split, and always answering 'cat' on 50.0%")


def test_the_warning_comes_before_the_sealed_split_is_opened(tmp_path, capsys):
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LEDGER))
    right = np.zeros(120)
    right[:20] = 1
    arguments = tmp_path, Compress(), setup_of()
    assert checks.warn_if_useless_on_decide(*arguments, right, {"logits": logits_of(LABELS)})
    error = capsys.readouterr().err
    assert error.startswith(
        "ev3-distill: warning: The student is useless: it is right on 16.7% of decide, always answering 'cat' on "
        "50.0%. Likely cause: "
    )
    assert not checks.warn_if_useless_on_decide(*arguments, np.ones(120), {"logits": logits_of(LABELS)})
    assert not checks.warn_if_useless_on_decide(*arguments, None, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("useless", [True, False])
def test_the_page_and_the_terminal_show_the_alarm(useless):
    rows = make_rows(20)
    report = copy.deepcopy(make_report(rows))
    message = "The student is useless: it is right on 39.2% of <b>, and so on"
    report["usefulness"] = {"alarm": "constant" if useless else "", "message": message, "causes": ["a cause"]}
    page = report_page.render(report, rows)
    assert ('<h1 class="alarm">The student is useless' in page) == useless
    assert ("Likely cause: a cause." in page) == useless
    assert "<b>," not in page
    lines = "".join(str(part) for part in report_page.terminal_summary(report).renderables)
    assert (message in lines) == useless
