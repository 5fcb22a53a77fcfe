"""Classification into K exclusive classes: targets are labels [N] int32, outputs are logits [N, K]."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ev3_distill.tasks.base import Task
from ev3_distill.tasks.classification import example_scores, losses
from ev3_distill.tasks.classification.disagreement import find_disagreement
from ev3_distill.tasks.classification.example_metrics import predicted_class
from ev3_distill.tasks.classification.tables import accuracy_tables
from ev3_distill.tasks.classification.usefulness import classifier_usefulness
from ev3_distill.tasks.metrics import METRICS
from ev3_distill.types import Promise

ACCURACY = Promise("accuracy", example_scores.accuracy, binary=True)


def classification(num_classes: int = 0) -> Task:
    """The task of telling K classes apart.

    Args:
      num_classes: K, at least 2; 0 if it is not known.
    """
    logits = jax.ShapeDtypeStruct((num_classes,), jnp.float32)
    return Task(
        name="classification",
        target_spec=jax.ShapeDtypeStruct((), jnp.int32),
        output_spec=logits,
        teacher_spec={"logits": logits},
        losses=losses.LOSSES,
        select=example_scores.DEFAULT_SELECT,
        promise=ACCURACY,
        metrics=METRICS,
        strata=np.asarray,
        targets_from_teacher=_teacher_classes,
        same_answer=_same_class,
        teacher_codec="logits",
        diagnosis="classification",
        card_task=_card_task,
        tables=accuracy_tables,
        usefulness=classifier_usefulness,
        disagreement=find_disagreement,
    )


def _teacher_classes(teacher: Mapping[str, np.ndarray]) -> np.ndarray:
    """The class [N] of the teacher's greatest logit."""
    return np.asarray(teacher["logits"]).argmax(axis=1)


def _same_class(one: Any, other: Any) -> np.ndarray:
    """Whether both name the same class, [N]; works on logits and on probabilities."""
    return np.asarray(predicted_class(np.asarray(one)) == predicted_class(np.asarray(other)))


def _card_task(input_shape: tuple[int, ...]) -> str:
    """The pipeline tag of the Hugging Face hub."""
    return {3: "image-classification", 1: "tabular-classification"}.get(len(input_shape), "other")
