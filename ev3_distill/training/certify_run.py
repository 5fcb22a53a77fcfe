"""Certifying: the sealed split is opened, on record, for the student that is final, or a few, and one is certified from it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ev3_distill.certify.certificate import Certificate
from ev3_distill.data.sources import Dataset
from ev3_distill.guards import KNOWN, Guard, judge
from ev3_distill.runtime.digest import tree_digest
from ev3_distill.runtime.latency import passes_ms
from ev3_distill.students.network import count_params
from ev3_distill.tasks.classification.metric_bounds import Bound, Outputs, digest_of_costs, latency, said
from ev3_distill.training import run_dir, sealed_split
from ev3_distill.types import Batch, Network, Variables


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What is to be promised, fixed before the split is opened."""

    metrics: Sequence[str]
    class_names: Sequence[str]
    confidence: float
    costs: np.ndarray | None = None  # [K, K], for a claim on them


def metrics_asked(guards: Iterable[Guard], *, labelled: bool, teacher: bool) -> list[str]:
    """Accuracy where there are labels, agreement where there is a teacher, and what guards ask for, each once."""
    promised = [name for name, holds in (("accuracy", labelled), ("agreement", teacher)) if holds]
    return list(dict.fromkeys([*promised, *(guard.metric for guard in guards if guard.metric not in KNOWN)]))


class Certified(NamedTuple):
    """What came of it."""

    which: int  # of the candidates
    certificate: Certificate
    guards: list[dict[str, Any]]  # see `guards.judge`
    of_teacher: float | None  # its own accuracy


def certified(
    directory: Path,
    candidates: Sequence[tuple[Network, Variables]],
    dataset: Dataset,
    *,
    test: Callable[[], Iterable[Batch]],
    asked: Asked,
    guards: Sequence[Guard],
    teacher: bool,
    batch_size: int,
) -> Certified:
    """Opens a run's sealed split for its student, and writes what may be promised.

    Of several candidates it is the first whose guards all are certified, or the last.

    Args:
      directory: of the run.
      candidates: students, final, the most wanted first.
      dataset: that the split is of.
      test: the split in parts, which nobody has looked at before this.
      asked: what is to be promised.
      guards: what must hold.
      teacher: whether there is one.
      batch_size: examples of one forward pass.
    """
    labelled = bool((dataset.labels >= 0).any())
    names, among = [tree_digest(variables) for _, variables in candidates], len(candidates)
    sealed_split.open_split(
        directory,
        names[0],
        asked.metrics,
        confidence=asked.confidence,
        costs=digest_of_costs(asked.costs),
        others=names[1:],
    )
    for which, (network, variables) in enumerate(candidates):
        outputs = run_dir.outputs_of(
            network, variables, test(), labelled=labelled, teacher=teacher, batch_size=batch_size
        )
        certificate = run_dir.certificate_of(
            outputs._replace(num_groups=len(dataset.group_names)),
            asked.metrics,
            class_names=asked.class_names,
            group_names=dataset.group_names,
            confidence=asked.confidence,
            costs=asked.costs,
            measured=measured(asked.metrics, network, variables, dataset),
            among=among,
        )
        judged = judge(guards, certificate.claims, known=known_of(variables))
        if which + 1 == among or all(guard["certified"] for guard in judged):
            run_dir.write_certificate(directory, certificate, names[which])
            return Certified(which, certificate, judged, _of_teacher(outputs))
    raise ValueError("a split is opened for at least one student; got none")


def _of_teacher(outputs: Outputs) -> float | None:
    """The teacher's own accuracy, where there are labels and a teacher."""
    labelled = outputs.labels >= 0
    if outputs.teacher_logits is None or not labelled.any():
        return None
    return float((said(outputs.teacher_logits) == outputs.labels)[labelled].mean())


def measured(metrics: Sequence[str], network: Network, variables: Variables, dataset: Dataset) -> dict[str, Bound]:
    """Those of the claims that stand on measurements of their own, made here."""
    if "latency_ms" not in metrics:
        return {}
    return {"latency_ms": latency(passes_ms(network, variables, dataset.inputs[:1][0]))}


def known_of(variables: Variables) -> dict[str, int]:
    """What is known of a student without an example: trained parameters, and bytes of all its arrays as they are saved."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    return {"params": count_params(variables), "bytes": size}
