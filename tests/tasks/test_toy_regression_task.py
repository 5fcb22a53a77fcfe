"""A toy regression task with one real output runs without changes to core, training or certify."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ev3_distill import config
from ev3_distill.certify.certificate import mean_bound
from ev3_distill.data.sources import Dataset
from ev3_distill.runtime.ledger import read_rows
from ev3_distill.students import from_nnx
from ev3_distill.tasks.base import Task
from ev3_distill.tasks.metrics import Metric
from ev3_distill.teachers.targets import RecordedTargets
from ev3_distill.training.setup import make_setup
from ev3_distill.training.train import train
from ev3_distill.types import Promise

VALUE = jax.ShapeDtypeStruct((), jnp.float32)
METRIC = "closeness"


def closeness(values, targets, xp=jnp):
    """exp(-|error|): 1 for an exact answer, in [0, 1]; 0 for a missing target."""
    return xp.where(xp.isnan(targets), 0.0, xp.exp(-xp.abs(values - xp.nan_to_num(targets))))


def closeness_bound(query, outputs):
    known = outputs.with_target()
    return mean_bound(query.name, closeness(known.student, known.targets, xp=np), 0.0, 1.0)


def distance_to_teacher():
    return lambda values, batch: jnp.square(values - batch.teacher["values"]).mean()


def toy_task():
    def score(values, split):
        return closeness(values, split.targets)

    return Task(
        name="toy regression",
        target_spec=VALUE,
        output_spec=VALUE,
        teacher_spec={"values": VALUE},
        losses={"distance": distance_to_teacher},
        select=score,
        promise=Promise(METRIC, score, binary=False),
        metrics={METRIC: Metric(METRIC, METRIC, bound=closeness_bound, by_default=True)},
        strata=lambda targets: np.digitize(targets, np.quantile(targets, (0.25, 0.5, 0.75))),
        targets_from_teacher=lambda teacher: teacher["values"],
        same_answer=lambda one, other: np.isclose(one, other, rtol=1e-3),
        teacher_codec="arrays",
        diagnosis=None,
        card_task=lambda shape: "tabular-regression",
    )


class Line(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.linear(inputs)[:, 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    inputs = rng.normal(size=(2000, 3)).astype(np.float32)
    teacher = inputs @ np.float32([1, -2, 0.5]) + 3
    targets = teacher + rng.normal(scale=0.1, size=2000).astype(np.float32)
    dataset = Dataset(inputs, targets, 0, (), None, "toy", "0")
    settings = config.Compress(augment="none", budget="1500")
    setup = make_setup(settings, from_nnx(Line), dataset, toy_task())
    train(directory, settings, setup, ["distance"], RecordedTargets({"values": teacher}), teacher={"source": "toy"})
    return directory


def test_promotions_are_proved_by_betting(run):
    rows = list(read_rows(run / "ledger.jsonl"))
    promoted = [row for row in rows if row["verdict"] == "promote"]
    assert promoted and rows[-1][f"champion_{METRIC}"] > rows[0][f"current_{METRIC}"] + 0.2
    assert all(row["test"]["p_value"] <= row["test"]["alpha"] and row["test"]["bound"] is None for row in promoted)


def test_student_is_certified(run):
    certificate = json.loads((run / "certificate.json").read_text())
    (claim,) = certificate["claims"]
    assert claim["metric"] == METRIC and 0.7 < claim["lower_bound"] < claim["point"] <= 1
    report = json.loads((run / "report.json").read_text())
    assert report["student"][METRIC] == claim["point"] and report["teacher"]["accuracy"] > 0.8
