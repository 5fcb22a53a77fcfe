"""Certification is independent of the task: a regression is certified by a metric of its own, without class tables."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ev3_distill.certify.bounds import mean_lower
from ev3_distill.certify.certificate import mean_bound
from ev3_distill.guards import parse
from ev3_distill.tasks.base import Task
from ev3_distill.tasks.metrics import Metric
from ev3_distill.training.certify_run import CertificateRequest, certify_run, metrics_to_claim
from ev3_distill.types import Batch, Network, Promise, Variables

SCALAR = jax.ShapeDtypeStruct((1,), jnp.float32)


def closeness(outputs, targets):
    """1 at the target, 0 at a distance of 1 or more."""
    return (1 - abs(outputs - targets)).clip(0, 1)[:, 0]


def closeness_bound(query, outputs):
    outputs = outputs.with_target()
    return mean_bound(query.name, closeness(outputs.student, outputs.targets), 0, 1)


METRICS = {"closeness": Metric("closeness", "closeness", bound=closeness_bound, by_default=True)}


@pytest.fixture
def regression():
    return Task(
        name="regression",
        target_spec=SCALAR,
        output_spec=SCALAR,
        teacher_spec={"value": SCALAR},
        losses={},
        select=None,
        promise=Promise("closeness", None, binary=False),
        metrics=METRICS,
        strata=None,
        targets_from_teacher=None,
        same_answer=None,
        teacher_codec="",
        diagnosis=None,
        card_task=str,
    )


def test_regression_is_certified_by_its_own_metric(here, regression):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(100, 1)).astype(np.float32)
    targets = inputs + rng.uniform(-0.2, 0.2, size=(100, 1)).astype(np.float32)
    targets[:10] = np.nan  # missing
    teacher = inputs + 0.5
    network = Network(None, lambda variables, x, train: (x * variables.params, variables), {})

    def test():
        for part in np.array_split(np.arange(100), 3):
            yield Batch(inputs[part], targets[part], {"value": teacher[part]}, part, np.ones(len(part)))

    guards = [parse("closeness >= 0.7", METRICS)]
    metrics = metrics_to_claim(guards, labeled=True, teacher=True, metrics=METRICS)
    certification = certify_run(
        here,
        [(network, Variables(np.float32(1), {}))],
        SimpleNamespace(labels=targets, inputs=inputs),
        test=test,
        request=CertificateRequest(regression, metrics, 0.9),
        guards=guards,
        teacher=True,
        batch_size=64,
    )
    scores = closeness(inputs, targets)[10:]
    (claim,) = certification.certificate.claims
    assert claim.lower_bound == pytest.approx(mean_lower(scores, 0, 1, confidence=0.9))
    assert claim.n == 90
    assert certification.certificate.tables == ()
    assert certification.guards[0]["certified"]
    assert certification.teacher_score == pytest.approx(closeness(teacher, targets)[10:].mean())
    record = json.loads((here / "opened.json").read_text())
    assert record["openings"][0]["family"] == ["closeness"]
    assert json.loads((here / "certificate.json").read_text())["claims"][0]["metric"] == "closeness"
