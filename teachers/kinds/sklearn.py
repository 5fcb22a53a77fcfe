"""`sklearn:FILE.skops`: a scikit-learn classifier saved with skops. Loading it never runs code from the file."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ev3_distill.errors import InputError, summary
from ev3_distill.runtime.files import sha256_of
from ev3_distill.teachers.loading import digest_of, import_package, split_file_and_outputs
from ev3_distill.teachers.output_meaning import LEAST_PROBABILITY
from ev3_distill.teachers.preprocessing import read_preprocessing_file
from ev3_distill.teachers.teacher import Model, Outputs, Request, Teacher, build_teacher


def sklearn_teacher(place: str, request: Request) -> Teacher:
    """Loads the classifier in a skops file. Its inputs are flattened.

    Logits are the decision function [B, K]. With two classes the decision d is one number, and the logits are (-d/2, d/2),
    whose softmax is the logistic function of d. Without a decision function they are the logarithms of `predict_proba`.

    Raises:
      InputError: the file is missing or damaged, holds untrusted types, or holds no classifier.
    """
    path, names = split_file_and_outputs(place, kind="sklearn")
    if names:
        raise InputError(f"an sklearn teacher has one output; got the names {', '.join(names)}: remove # and the names")
    estimator = _load(path)
    classes = getattr(estimator, "classes_", None)
    decides = hasattr(estimator, "decision_function") or hasattr(estimator, "predict_proba")
    if not isinstance(classes, np.ndarray) or classes.ndim != 1 or not decides:
        raise InputError(
            f"an sklearn teacher is a fitted classifier with decision_function or predict_proba; {path} holds "
            f"{type(estimator).__name__}: save a classifier with one label per example (regressions and several targets are "
            "tasks that ev3-distill does not offer yet)"
        )
    if getattr(estimator, "multilabel_", False):
        raise _several_labels(estimator)
    features = getattr(estimator, "n_features_in_", None)
    model = Model(
        run=lambda ready: _logits(estimator, ready.reshape(len(ready), -1), len(classes)),
        digest=digest_of(["sklearn", sha256_of(path)]),
        file_preprocessing=read_preprocessing_file(path),
        input_shape=(None if features is None else int(features),),
        num_outputs=len(classes),
        class_names=tuple(name.decode() if isinstance(name, bytes) else str(name) for name in classes.tolist()),
    )
    return build_teacher(model, request)


def _load(path: Path) -> Any:
    io = import_package("skops.io", kind="sklearn", install="ev3-distill[sklearn]")
    try:
        untrusted = io.get_untrusted_types(file=str(path))
        if not untrusted:
            return io.load(str(path), trusted=[])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, zipfile.BadZipFile) as error:
        raise InputError(
            f"sklearn:FILE needs a file that skops.io.dump wrote; {path} fails with {summary(error)}: write it again"
        ) from None
    raise InputError(
        f"a skops file may hold only types that skops trusts; {path} holds {', '.join(untrusted)}: if you trust them, load it "
        "in your own module and give python:MODULE:FUNCTION"
    )


def _logits(estimator: Any, rows: np.ndarray, classes: int) -> Outputs:
    one_vs_one = classes > 2 and getattr(_last(estimator), "decision_function_shape", "") == "ovo"
    if hasattr(estimator, "decision_function") and not one_vs_one:
        decision = np.asarray(estimator.decision_function(rows))
        return {"logits": np.stack([-decision / 2, decision / 2], axis=1) if decision.ndim == 1 else decision}
    probabilities = np.asarray(estimator.predict_proba(rows))
    if not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
        raise _several_labels(estimator)
    return {"logits": np.log(np.clip(probabilities, LEAST_PROBABILITY, 1))}


def _several_labels(estimator: Any) -> InputError:
    return InputError(
        "a teacher gives one class per example; got probabilities of several labels (multi-label) from "
        f"{type(estimator).__name__}, a task that ev3-distill does not offer yet: use a teacher whose classes exclude "
        "each other"
    )


def _last(estimator: Any) -> Any:
    """The classifier at the end of a pipeline."""
    steps = getattr(estimator, "steps", None)
    return steps[-1][1] if steps else estimator
