"""What the commands do: compose data, teacher, student, arms and core into a run. The heavy half of the command line."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import students
from ev3_distill import certificate, config, data, report, run
from ev3_distill.arms import arms_named
from ev3_distill.cli import read_config
from ev3_distill.errors import InputError
from ev3_distill.loop import UNLIMITED, Distillation
from ev3_distill.network import count_params
from ev3_distill.progress import Progress
from ev3_distill.types import Network
from teachers.flax import flax_teacher
from teachers.logits import load_logits, save_logits

TEACHERS = "logits:FILE.npz or flax:DIR"


def compress(directory: Path, chosen: config.Compress, *, resume: bool) -> dict[str, Any]:
    """Runs `compress` to its end, or on from where it was; returns the content of report.json.

    All that can be checked is checked before anything is written.
    """
    if not resume:
        run.refuse_occupied(directory)
    dataset = data.load_data(chosen.data)
    student, test = _checked(chosen, chosen.student, dataset)
    arms = [arm.name for arm in arms_named(student.apply, chosen.arms)]
    recipe = config.Teach(
        data=chosen.data,
        network=chosen.teacher_network,
        budget=chosen.teacher_budget,
        seed=chosen.seed,
        checkpoint_s=chosen.checkpoint_s,
        splits=chosen.splits,
    )
    network = None if chosen.teacher else _checked(recipe, recipe.network, dataset)[0]
    given: dict[str, Any] = {"fingerprint": dataset.fingerprint, "teacher_params": None}
    if resume:
        given = run.given_to(directory, dataset.fingerprint)
    cache, logits = directory / "logits.npz", None
    if chosen.teacher and not cache.exists():
        logits, given["teacher_params"] = _teacher(chosen.teacher, dataset, test)
    with run.room_on_disk(directory), run.held(directory, make=not resume):
        if not resume:
            run.create(directory, chosen, given)
        if finished := _finished(directory):
            return finished
        if network is not None:
            given["teacher_params"] = _own_teacher(directory / "teacher", recipe, dataset, network, cache)
        elif logits is not None:
            save_logits(cache, logits, dataset.fingerprint)
        logits = load_logits(
            cache,
            rows=len(dataset.labels),
            num_classes=dataset.num_classes,
            test_rows=dataset.test_rows,
            fingerprint=dataset.fingerprint,
        )
        source = chosen.teacher or f"trained here: {chosen.teacher_network}"
        teacher = {"source": source, "params": given["teacher_params"]}
        return _train(directory, chosen, dataset, student, arms, logits=logits, teacher=teacher)


def teach(directory: Path, chosen: config.Teach, *, resume: bool) -> dict[str, Any]:
    """Runs `teach`: the same run, with one arm that follows the labels alone; returns the content of report.json."""
    if not resume:
        run.refuse_occupied(directory)
    dataset = data.load_data(chosen.data)
    network, _ = _checked(chosen, chosen.network, dataset)
    if resume:
        run.given_to(directory, dataset.fingerprint)
    with run.room_on_disk(directory):
        return _teach(directory, chosen, dataset, network, resume=resume)


def _teach(
    directory: Path, chosen: config.Teach, dataset: data.Dataset, network: Network, *, resume: bool
) -> dict[str, Any]:
    with run.held(directory, make=not resume):
        if not resume:
            run.create(directory, chosen, {"fingerprint": dataset.fingerprint, "teacher_params": None})
        if finished := _finished(directory):
            return finished
        return _train(directory, chosen, dataset, network, ["ce"], logits=None, teacher=None)


def _own_teacher(directory: Path, recipe: config.Teach, dataset: data.Dataset, network: Network, cache: Path) -> int:
    """Trains the teacher of the recipe and caches its logits, each unless that is done; returns its parameters' number."""
    _teach(directory, recipe, dataset, network, resume=(directory / "config.toml").exists())
    variables = students.load_variables(directory / "student" / "variables", network)
    if not cache.exists():
        save_logits(cache, _logits(network, variables, dataset, str(directory)), dataset.fingerprint)
    return count_params(variables)


def evaluate(directory: Path, source: str, confidence: float, student: str = "") -> Sequence[certificate.Claim]:
    """Accuracy of a finished run's student on a source as a whole, or on the run's own sealed split.

    Args:
      directory: of the run.
      source: of examples; the run's own sealed split where none is named.
      confidence: of the bound.
      student: the MODULE:FACTORY that made the student, where it is of the user's own.
    """
    finished = _finished(directory)
    if finished is None:
        raise InputError(f"evaluate needs a finished run; {directory} has no report.json: finish it by --resume")
    network, variables = students.load(directory, factory=students.factory_of(student))
    chosen = _config_of(directory, finished)
    dataset, expected = data.load_data(source or chosen.data), finished["data"]
    if list(dataset.inputs.shape[1:]) != expected["input_shape"] or dataset.num_classes > len(expected["classes"]):
        raise InputError(
            f"the student takes inputs of shape {expected['input_shape']} and knows {len(expected['classes'])} classes; "
            f"{dataset.source} has {list(dataset.inputs.shape[1:])} and {dataset.num_classes}: name data like its own"
        )
    rows = np.arange(len(dataset.labels))
    if not source:
        run.given_to(directory, dataset.fingerprint)
        rows = data.split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits)["test"]
    predicted = flax_teacher(network, variables)(dataset.inputs[rows]).argmax(axis=1)
    scores = {"accuracy": (predicted == dataset.labels[rows]).astype(float)}
    return certificate.certify(scores, confidence=confidence).claims


def _checked(chosen: config.Compress | config.Teach, name: str, dataset: data.Dataset) -> tuple[Network, np.ndarray]:
    """The network of that name and the rows of the test split, once all that the data decide was checked."""
    network = students.named(name, dataset.inputs.shape[1:], dataset.num_classes)
    rows = data.split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits)
    steps = config.Budget.parse(chosen.budget).in_steps(len(rows["explore"]), chosen.ev3.batch_size)
    if steps is not None and steps >= UNLIMITED:
        raise InputError(f"a budget is below {UNLIMITED} steps; got '{chosen.budget}', {steps} steps: give less")
    return network, rows["test"]


def _config_of(directory: Path, finished: dict[str, Any]) -> config.Compress | config.Teach:
    is_teacher = finished["teacher"]["source"] == "labels"
    return read_config(config.Teach if is_teacher else config.Compress, directory / "config.toml")


def _finished(directory: Path) -> dict[str, Any] | None:
    """The report of a run that has one; its page is rendered where a kill came between the two."""
    if not (directory / "report.json").exists():
        return None
    finished = run.read_json(directory / "report.json")
    if not (directory / "report.html").exists():
        report.write_html(directory)
    return finished


def _teacher(teacher: str, dataset: data.Dataset, test: np.ndarray) -> tuple[np.ndarray, int | None]:
    """Logits [N, K] of a named teacher on the data set, and the number of its parameters where they are known."""
    kind, _, place = teacher.partition(":")
    if kind == "logits" and place:
        rows, classes = len(dataset.labels), dataset.num_classes
        fingerprint, test_rows = dataset.fingerprint, dataset.test_rows
        return load_logits(place, rows=rows, num_classes=classes, test_rows=test_rows, fingerprint=fingerprint), None
    if kind != "flax" or not place:
        raise InputError(f"a teacher is {TEACHERS}; got '{teacher}': name one of these, or none to train one first")
    network, variables = students.load(place)
    shape, classes = tuple(network.spec["input_shape"]), network.spec["num_classes"]
    if shape != dataset.inputs.shape[1:] or classes != dataset.num_classes:
        raise InputError(
            f"teacher and data must agree in input shape and class count; {teacher} has {shape} and {classes} classes, "
            f"the data {dataset.inputs.shape[1:]} and {dataset.num_classes}: choose the data that it was trained for"
        )
    if seen := _seen(Path(place), dataset, test):
        warn(
            f"{teacher} was trained on these data with other splits and has seen {seen} of the {len(test)} test examples: "
            "the certificate may promise too much; give both runs the same --seed and splits"
        )
    return _logits(network, variables, dataset, teacher), count_params(variables)


def _seen(place: Path, dataset: data.Dataset, test: np.ndarray) -> int:
    """How many test examples the run that made a teacher did not seal, where it was made on this very data set."""
    for directory in (place, place.absolute().parent):
        if not (directory / "report.json").exists():
            continue
        finished = run.read_json(directory / "report.json")
        if finished["data"]["fingerprint"] != dataset.fingerprint:
            return 0
        theirs = _config_of(directory, finished)
        sealed = data.split_rows(dataset.labels, dataset.test_rows, seed=theirs.seed, fractions=theirs.splits)["test"]
        return len(np.setdiff1d(test, sealed))
    return 0


def _logits(network: Network, variables: Any, dataset: data.Dataset, teacher: str) -> np.ndarray:
    logits = flax_teacher(network, variables)(dataset.inputs)
    if not np.isfinite(logits).all():
        row = int(np.isfinite(logits).all(axis=1).argmin())
        raise InputError(f"a teacher's logits must be finite; {teacher} gives others for row {row}: train it again")
    return logits


def _train(
    directory: Path,
    chosen: Any,
    dataset: data.Dataset,
    network: Network,
    arm_names: Sequence[str],
    *,
    logits: np.ndarray | None,
    teacher: dict[str, Any] | None,
) -> dict[str, Any]:
    """The run itself, from its newest checkpoint if there is one: iterate, deliver, certify, report."""
    blank = np.zeros((len(dataset.labels), dataset.num_classes), np.float32)
    known = blank if logits is None else logits
    pools, test = data.split(dataset, known, seed=chosen.seed, fractions=chosen.splits)
    budget = config.Budget.parse(chosen.budget)
    steps = budget.in_steps(pools.explore.index.shape[0], chosen.ev3.batch_size)
    title = "teacher" if teacher is None else "student"
    with Progress(title, steps=steps, seconds=budget.seconds) as progress:
        distillation = Distillation(network, arms_named(network.apply, arm_names), config=chosen.ev3)
        state = run.iterate(
            directory,
            distillation,
            pools,
            arm_names,
            seed=chosen.seed,
            budget=steps,
            seconds=budget.seconds,
            checkpoint_s=chosen.checkpoint_s,
            tell=progress.row,
            warn=warn,
        )
    which, variables = distillation.delivered(pools, state, getattr(chosen, "deliver", "best"))
    students.save(directory / "student", network, variables)
    promised = run.certificate_of(
        distillation, variables, test, teacher=teacher is not None, confidence=chosen.confidence
    ).as_dict()
    points = {claim["metric"]: claim["point"] for claim in promised["claims"]}
    facts = {
        "teacher": {"source": "labels", "params": None, "accuracy": None}
        if teacher is None
        else {**teacher, "accuracy": float((np.argmax(test.teacher_logits, axis=1) == test.labels).mean())},
        "student": {
            "network": chosen.network if teacher is None else chosen.student,
            "params": count_params(variables),
            "accuracy": points["accuracy"],
            "agreement": points.get("agreement"),
            "delivered": which,
        },
        "certificate": promised,
        "seed": chosen.seed,
        "budget": chosen.budget,
        "splits": dict(zip(data.SPLITS, (len(split.labels) for split in (*pools[:3], test)), strict=True)),
        "data": {
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "classes": list(dataset.class_names),
            "input_shape": list(dataset.inputs.shape[1:]),
        },
        "command": f"ev3-distill {'teach' if teacher is None else 'compress'} --config config.toml",
    }
    content = run.report_of(
        directory, state, arm_names, compile_s=distillation.compile_s, config=chosen.ev3, facts=facts
    )
    run.write_json(directory / "report.json", content)
    report.write_html(directory)
    return content


def warn(line: str) -> None:
    """A line that a user should not miss."""
    print(f"ev3-distill: warning: {line}", file=sys.stderr)
