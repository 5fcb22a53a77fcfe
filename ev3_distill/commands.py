"""What the commands do: compose data, teacher, student, arms and core into a run. The heavy half of the command line."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import students
from ev3_distill import certificate, claims, config, opening, report, run
from ev3_distill.arms import BY_PEERS, arms_named, default_names, features_asked, name_for_labels
from ev3_distill.certifying import known_of, measured, metrics_asked
from ev3_distill.cli import read_config
from ev3_distill.counter import Counter
from ev3_distill.course import (
    CHUNK,
    Task,
    bytes_of_example,
    checked,
    evaluated_at_once,
    give_back,
    limit_of,
    share_of,
)
from ev3_distill.errors import InputError, warn
from ev3_distill.guards import FORMS, KNOWN, TOP_K, Guard, form_of, judge, parse
from ev3_distill.lessons import BATCH, Labels, Lessons, Recorded, chunked
from ev3_distill.network import count_params, features_of
from ev3_distill.search import search
from ev3_distill.sources import Dataset, load_data
from ev3_distill.splits import shared, split_rows
from ev3_distill.training import train
from ev3_distill.types import Network, Variables
from teachers import Teacher, load_logits, load_teacher, save_logits
from teachers.diagnosis import diagnose
from teachers.flax import forward

SHOWN = 4096  # held-out examples that show whether a teacher is any good, at most,
SHOWN_SHARE = 32  # and this share of the memory limit


def compress(directory: Path, chosen: config.Compress, *, resume: bool) -> dict[str, Any]:
    """Runs `compress` to its end, or on from where it was; returns the content of report.json.

    All that can be checked is checked before anything is written.
    """
    if not resume:
        run.refuse_occupied(directory)
    with run.room_on_disk(directory):
        return _compress(directory, chosen, resume=resume)


def _compress(directory: Path, chosen: config.Compress, *, resume: bool) -> dict[str, Any]:
    give_back(chosen.memory)
    dataset = _data(chosen)
    given: dict[str, Any] = {"fingerprint": dataset.fingerprint, "teacher": None}
    if resume:
        given = run.given_to(directory, dataset.fingerprint)
    if not chosen.teacher:
        return _with_own_teacher(directory, chosen, dataset, given, resume=resume)
    if chosen.teacher.startswith("logits:"):
        return _with_recorded(directory, chosen, dataset, given, resume=resume)
    teacher, classes = _teacher(chosen, dataset)
    shapes = {name: rows.shape[1:] for name, rows in teacher.outputs(dataset.inputs[:1]).items() if name != "logits"}
    task, arms = _task(chosen, dataset, classes, shapes)
    if resume:
        _check_same(teacher, given["teacher"], directory)
    else:
        given["teacher"] = {"digest": teacher.digest, "params": teacher.params}
        _check_good(teacher, chosen, task)
    with _begun(directory, chosen, given, resume=resume) as finished:
        return finished or _distil(directory, chosen, task, arms, teacher, source=chosen.teacher)


def _with_own_teacher(
    directory: Path, chosen: config.Compress, dataset: Dataset, given: dict[str, Any], *, resume: bool
) -> dict[str, Any]:
    """The run in which a teacher is trained first."""
    recipe = _recipe(chosen, chosen.teacher_network, chosen.teacher_budget)
    _check_labelled(dataset, "a teacher that is trained here")
    of_teacher = checked(recipe, recipe.network, dataset, dataset.num_classes)
    task, arms = _task(chosen, dataset, dataset.num_classes, features_of(of_teacher.network))
    with _begun(directory, chosen, given, resume=resume) as finished:
        if finished:
            return finished
        own = directory / "teacher"
        _teach(own, recipe, of_teacher, resume=(own / "config.toml").exists())
        asked = "#" + ",".join(task.teacher_features) if task.teacher_features else ""
        of_user = students.factory_of(chosen.teacher_network)
        load = functools.partial(students.load, factory=of_user)
        teacher = _loaded(f"flax:{own}{asked}", chosen, dataset, networks=load)
        return _distil(directory, chosen, task, arms, teacher, source=f"trained here: {chosen.teacher_network}")


def _recipe(chosen: config.Compress, network: str, budget: str, ev3: config.EV3 | None = None) -> config.Teach:
    """How a network is trained by labels alone within the run, on the run's own splits."""
    return config.Teach(
        data=chosen.data,
        network=network,
        budget=budget,
        seed=chosen.seed,
        augment=chosen.augment,
        memory=chosen.memory,
        skip_corrupt=chosen.skip_corrupt,
        checkpoint_s=chosen.checkpoint_s,
        splits=chosen.splits,
        ev3=ev3 or config.EV3(),
    )


def _with_recorded(
    directory: Path, chosen: config.Compress, dataset: Dataset, given: dict[str, Any], *, resume: bool
) -> dict[str, Any]:
    """The run whose teacher has run already; its logits are kept in the run."""
    kept = directory / "logits.npz"

    def load(path: str | Path) -> np.ndarray:
        return load_logits(
            path,
            rows=len(dataset.labels),
            num_classes=dataset.num_classes,
            test_rows=dataset.test_rows,
            fingerprint=dataset.fingerprint,
        )

    logits = load(kept if kept.exists() else chosen.teacher.partition(":")[2])
    chosen = dataclasses.replace(chosen, augment="none") if chosen.augment == "auto" else chosen
    task, arms = _task(chosen, dataset, logits.shape[1], {})
    with _begun(directory, chosen, given, resume=resume) as finished:
        if finished:
            return finished
        if not kept.exists():
            save_logits(kept, logits, dataset.fingerprint)
        facts = {"source": chosen.teacher, "params": None}
        if chosen.start or chosen.sizes:
            return search(directory, chosen, task, arms, Recorded(logits), teacher=facts)
        task = _controlled(directory, chosen, task)
        return train(directory, chosen, task, arms, Recorded(logits), teacher=facts)


def _distil(
    directory: Path, chosen: config.Compress, task: Task, arms: Sequence[str], teacher: Teacher, *, source: str
) -> dict[str, Any]:
    """The student's training under a teacher that runs here."""
    classes = task.network.spec["num_classes"]
    in_step = None
    if chosen.teacher_in_step:
        if teacher.network is None or teacher.variables is None:
            raise InputError(
                f"a teacher inside the step is a flax: one that takes the data as they are; got {teacher.source}: leave "
                "out --teacher-in-step"
            )
        in_step = teacher.network, teacher.variables
    task = _controlled(directory, chosen, task)
    lessons = Lessons(
        teacher,
        task.dataset,
        num_classes=classes,
        features=tuple(task.teacher_features),
        precision=chosen.precision,
        batch_size=evaluated_at_once(task.dataset, task.memory, BATCH),
        warn=warn,
    )
    with contextlib.closing(lessons):
        facts = {"source": source, "params": teacher.params}
        if chosen.start or chosen.sizes:
            return search(directory, chosen, task, arms, lessons, teacher=facts)
        return train(directory, chosen, task, arms, lessons, teacher=facts, in_step=in_step)


def _controlled(directory: Path, chosen: config.Compress, task: Task) -> Task:
    """The task with its control, trained in the run's own directory, where one is wanted."""
    if not chosen.control:
        return task
    recipe = _recipe(chosen, chosen.student, chosen.budget, ev3=chosen.ev3)
    own = directory / "control"
    _teach(
        own, recipe, dataclasses.replace(task, teacher_features={}, guards=()), resume=(own / "config.toml").exists()
    )
    return dataclasses.replace(task, control=own)


def teach(directory: Path, chosen: config.Teach, *, resume: bool) -> dict[str, Any]:
    """Runs `teach`: the same run, with one arm that follows the labels alone; returns the content of report.json."""
    if not resume:
        run.refuse_occupied(directory)
    give_back(chosen.memory)
    dataset = _data(chosen)
    _check_labelled(dataset, "teach")
    task = checked(chosen, chosen.network, dataset, dataset.num_classes)
    _warn_of_duplicates(task)
    if resume:
        run.given_to(directory, dataset.fingerprint)
    with run.room_on_disk(directory):
        return _teach(directory, chosen, task, resume=resume)


def _teach(directory: Path, chosen: config.Teach, task: Task, *, resume: bool) -> dict[str, Any]:
    given = {"fingerprint": task.dataset.fingerprint, "teacher": None}
    with _begun(directory, chosen, given, resume=resume) as finished:
        if finished:
            return finished
        lessons = Labels(len(task.dataset.labels), task.dataset.num_classes)
        return train(directory, chosen, task, [name_for_labels(task.network.spec)], lessons, teacher=None)


@contextlib.contextmanager
def _begun(directory: Path, chosen: Any, given: dict[str, Any], *, resume: bool) -> Iterator[dict[str, Any] | None]:
    """Holds the run, made if it is new; gives its report where it is finished already."""
    with run.held(directory, make=not resume):
        if not resume:
            run.create(directory, chosen, given)
        yield _finished(directory)


def _data(chosen: config.Compress | config.Teach, source: str = "") -> Dataset:
    with Counter("images", things="images") as counter:
        return load_data(
            source or chosen.data,
            memory=share_of(limit_of(chosen.memory)),
            skip_corrupt=chosen.skip_corrupt,
            warn=warn,
            tell=counter.tell,
        )


def _check_labelled(dataset: Dataset, who: str) -> None:
    if not (dataset.labels >= 0).any():
        raise InputError(f"{who} needs labels; {dataset.source} has none: name a --teacher, or data with labels")


def _task(
    chosen: config.Compress, dataset: Dataset, num_classes: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Task, list[str]]:
    """The student's task and its arms; `shapes` are those of the teacher's features, of which the arms ask for some."""
    task = checked(chosen, chosen.student, dataset, num_classes)
    if chosen.start or chosen.sizes:
        task = dataclasses.replace(task, network=_smallest(chosen, task.network.spec))
    _warn_of_duplicates(task)
    costs = claims.read_costs(path, num_classes) if (path := chosen.costs) else None
    guards = _guards(chosen.guards, dataset, task.network, costs=costs)
    labelled = bool((dataset.labels >= 0).any())
    if chosen.control:
        _check_labelled(dataset, "a control that learns by labels alone")
    names = chosen.arms or default_names(task.network.spec, labels=labelled, goals=[guard.metric for guard in guards])
    if by_peers := [name for name in names if name in BY_PEERS]:
        raise InputError(f"only a search has peers to learn from; got the arm '{by_peers[0]}': leave it out")
    if chosen.tune:
        _check_labelled(dataset, "an arm that tunes its loss")
        names = (*names, f"tuned-{'-'.join(chosen.tune)}")
    arms = arms_named(task.network.apply, names, network=task.network, teacher_features=shapes)
    asked = {name: shapes[name] for name in features_asked(names)}
    return dataclasses.replace(task, teacher_features=asked, guards=guards, costs=costs), [arm.name for arm in arms]


def _smallest(chosen: config.Compress, spec: Mapping[str, Any]) -> Network:
    """The network that a search begins with, once its sizes are checked."""
    shape = spec["input_shape"], spec["num_classes"]
    if chosen.start:
        return students.tiny(chosen.student, *shape) if chosen.start == "tiny" else students.named(chosen.start, *shape)
    ladder = [students.named(text, *shape) for text in chosen.sizes]
    params = [count_params(jax.eval_shape(network.init, jax.random.key(0))) for network in ladder]
    if sorted(set(params)) != params:
        raise InputError(
            f"the sizes of a search come smallest first; got {', '.join(chosen.sizes)} of {params} parameters: order them"
        )
    return ladder[0]


def _warn_of_duplicates(task: Task) -> None:
    """Says so where examples of one split lie in another one too; data that stay on disk are not looked through."""
    if not isinstance(task.dataset.inputs, np.ndarray):
        return
    for (later, earlier), count in shared(task.dataset.inputs, task.rows).items():
        then = "the certificate may promise too much" if later == "test" else "what it decides may be optimistic"
        warn(
            f"{count} of the {len(task.rows[later])} examples of {later} have the very inputs of one in {earlier}: {then}; "
            "leave duplicates out of the data"
        )


def _guards(
    texts: Sequence[str], dataset: Dataset, network: Network, *, costs: np.ndarray | None, teacher: bool = True
) -> list[Guard]:
    """The guards, parsed, once it is clear that none is beyond what can be known, or reached."""
    parsed = [parse(text) for text in texts]
    for guard in parsed:
        _check_known(guard, dataset, network.spec["num_classes"], costs=costs is not None, teacher=teacher)
    known = known_of(jax.eval_shape(network.init, jax.random.key(0)))
    for guard in parsed:
        if guard.metric in KNOWN and known[guard.metric] > guard.threshold:
            has = f"{known[guard.metric]:,} {'parameters' if guard.metric == 'params' else 'bytes'}"
            raise InputError(
                f"a guard must be within reach; got '{guard}' and a student of {has}: name a smaller --student"
            )
    return parsed


def _check_known(guard: Guard, dataset: Dataset, num_classes: int, *, costs: bool, teacher: bool) -> None:
    """Whether a guard's metric can be known of a student on these data."""
    needs, told = guard.about.needs, f"a guard on {guard.metric} needs"
    if "labels" in needs and not (dataset.labels >= 0).any():
        raise InputError(f"{told} labels; {dataset.source} has none: guard agreement")
    if "teacher" in needs and not teacher:
        raise InputError(f"{told} the teacher; evaluate has the student alone: guard accuracy")
    if "groups" in needs and dataset.groups is None:
        raise InputError(f"{told} groups; {dataset.source} has none: guard worst_class_accuracy")
    if "costs" in needs and not costs:
        raise InputError(f"{told} costs; got none: give a CSV file of them by --costs")
    top = TOP_K.search(guard.metric) if form_of(guard.metric) in FORMS else None
    if top and int(top[1]) >= num_classes:
        raise InputError(
            f"{told} more classes; {dataset.source} has {num_classes}, and any answer is right: guard accuracy"
        )
    if form_of(guard.metric) == "MODULE:FUNCTION":
        claims.function_named(guard.metric)


def _teacher(chosen: config.Compress, dataset: Dataset) -> tuple[Teacher, int]:
    """The teacher that is named, and its number of classes; says so where it may have seen the test split."""
    teacher = _loaded(chosen.teacher, chosen, dataset)
    classes = dataset.num_classes or teacher.num_classes or teacher.outputs(dataset.inputs[:1])["logits"].shape[1]
    kind, _, place = chosen.teacher.partition(":")
    rows = split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits)
    if kind == "flax" and (seen := _seen(Path(place.partition("#")[0]), dataset, rows["test"])):
        warn(
            f"{chosen.teacher} was trained on these data with other splits and has seen {seen} of the {len(rows['test'])} "
            "test examples: the certificate may promise too much; give both runs the same --seed and splits"
        )
    return teacher, classes


def _loaded(
    name: str, chosen: config.Compress, dataset: Dataset, networks: Callable[..., Any] = students.load
) -> Teacher:
    return load_teacher(
        name,
        preprocessing=chosen.teacher_input,
        input_shape=dataset.inputs.shape[1:],
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        networks=networks,
    )


def _check_same(teacher: Teacher, given: dict[str, Any], directory: Path) -> None:
    if teacher.digest != given["digest"]:
        raise InputError(
            f"a resumed run needs the teacher that it began with, digest {given['digest'][:12]}; {teacher.source} has "
            f"{teacher.digest[:12]}: put the old one back, or start anew with --out instead of going on in {directory}"
        )


def _check_good(teacher: Teacher, chosen: config.Compress, task: Task) -> None:
    """Tells the teacher's own accuracy on what is not sealed; refuses one that a clear mistake makes bad."""
    rows = np.concatenate([task.rows[name] for name in ("assess", "decide")])
    most = min(SHOWN, max(task.memory // SHOWN_SHARE // bytes_of_example(task.dataset), 1))
    shown = np.sort(np.random.default_rng(0).permutation(rows)[:most])
    diagnosis = diagnose(
        teacher, np.asarray(task.dataset.inputs[shown]), task.dataset.labels[shown], task.dataset.class_names
    )
    for line in diagnosis.lines():
        told, _, rest = line.partition("warning: ")
        if rest and not told:
            warn(rest)
        else:
            print(line)
    if diagnosis.remedy is not None and not chosen.teacher_as_is:
        remedy = diagnosis.remedy
        raise InputError(
            f"a teacher must get the inputs that it was trained on; {teacher.source} is {remedy.before:.1%} right as it is "
            f"and {remedy.after:.1%} with {remedy.name}: give {remedy.option}, or --teacher-as-is to go on"
        )


def evaluate(
    directory: Path,
    source: str,
    confidence: float | None,
    student: str = "",
    guards: Sequence[str] = (),
    *,
    costs: str = "",
    reopen: bool = False,
) -> tuple[certificate.Certificate, list[dict[str, Any]]]:
    """Accuracy of a finished run's student, and what guards ask for, on a source as a whole or on the run's own sealed split.

    On the sealed split this is the run's own certificate again, claim by claim; what that does not claim needs `reopen`.

    Args:
      directory: of the run.
      source: of examples; the run's own sealed split where none is named.
      confidence: of all claims together; by default 0.95, or the run's own on its own split.
      student: the MODULE:FACTORY that made the student, where it is of the user's own.
      guards: what must hold of the student on these examples.
      costs: CSV file, for a guard on cost.
      reopen: the sealed split for other claims.

    Returns:
      The certificate, and for each guard whether it is certified, see `guards.judge`.
    """
    finished = _finished(directory)
    if finished is None:
        raise InputError(f"evaluate needs a finished run; {directory} has no report.json: finish it by --resume")
    network, variables = students.load(directory, factory=students.factory_of(student))
    chosen = _config_of(directory, finished)
    dataset, classes = _data(chosen, source), finished["data"]["classes"]
    _check_fits(dataset, finished["data"])
    rows = np.arange(len(dataset.labels))
    if not source:
        run.given_to(directory, dataset.fingerprint)
        rows = split_rows(dataset.labels, dataset.test_rows, seed=chosen.seed, fractions=chosen.splits)["test"]
    elif dataset.fingerprint == finished["data"]["fingerprint"]:
        warn(
            f"{source} are the data of the run, and trained the student: on the whole of them its accuracy proves nothing"
        )
    table = claims.read_costs(costs, len(classes)) if costs else None
    asked = _guards(guards, dataset, network, costs=table, teacher=False)
    metrics = metrics_asked(asked, labelled=True, teacher=False)
    level = _level(
        *(directory, finished, variables, metrics),
        confidence=confidence,
        costs=table,
        sealed=not source,
        reopen=reopen,
    )
    logits = forward(network, variables)
    at_once = evaluated_at_once(dataset, limit_of(chosen.memory), CHUNK)
    parts = [logits(dataset.inputs[part]) for part in chunked(rows, at_once)]
    groups = None if dataset.groups is None else dataset.groups[rows]
    outputs = certificate.Outputs(
        np.concatenate(parts), dataset.labels[rows], groups=groups, num_groups=len(dataset.group_names)
    )
    found = measured(metrics, network, variables, dataset)
    found |= certificate.claims_of([metric for metric in metrics if metric not in found], outputs, costs=table)
    made = certificate.certify(
        {metric: found[metric] for metric in metrics}, confidence=level.confidence, shares=level.shares
    )
    made = dataclasses.replace(made, reopened=level.reopened)
    if level.reopened:
        run.write_certificate(directory, made, opening.digest_of(variables))
    return made, judge(asked, made.claims, known=known_of(variables))


class _Level(NamedTuple):
    confidence: float
    shares: dict[str, float]  # of the error probability, by claim
    reopened: int


def _level(
    directory: Path,
    finished: dict[str, Any],
    variables: Variables,
    metrics: Sequence[str],
    *,
    confidence: float | None,
    costs: np.ndarray | None,
    sealed: bool,
    reopen: bool,
) -> _Level:
    """At which level `evaluate` may claim these metrics; opens the sealed split again where that is due."""
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"confidence is a probability above 0 and below 1; got {confidence}: try 0.95")
    if not sealed:
        return _Level(0.95 if confidence is None else confidence, certificate.shares_of(metrics), 0)
    own = finished["certificate"]["confidence"]
    student, digest = opening.digest_of(variables), claims.digest_of_costs(costs)
    if not opening.openings(directory):  # a run from before they were kept
        claimed = [claim["metric"] for claim in finished["certificate"]["claims"]]
        opening.open_split(directory, student, claimed, confidence=own)
    first, *_ = opening.openings(directory)
    same = (
        first["student"] == student
        and confidence in (None, own)
        and ("cost" not in metrics or first["costs"] == digest)
    )
    if same and set(metrics) <= set(first["claims"]):
        return _Level(own, certificate.shares_of(first["claims"]), 0)
    if confidence not in (None, own):
        raise InputError(
            f"a sealed split keeps the confidence that it was opened at; that of {directory} is {own:.10g}, got "
            f"{confidence:.10g}: leave out --confidence, or score other data by --data"
        )
    with run.held(directory):
        reopened = opening.open_split(directory, student, metrics, confidence=own, costs=digest, reopen=reopen)
    return _Level(own, certificate.shares_when_reopened(metrics, reopened), reopened)


def _check_fits(dataset: Dataset, expected: dict[str, Any]) -> None:
    """Whether a student of these data can be scored on that data set."""
    _check_labelled(dataset, "evaluate")
    if list(dataset.inputs.shape[1:]) != expected["input_shape"] or dataset.num_classes > len(expected["classes"]):
        raise InputError(
            f"the student takes inputs of shape {expected['input_shape']} and knows {len(expected['classes'])} classes; "
            f"{dataset.source} has {list(dataset.inputs.shape[1:])} and {dataset.num_classes}: name data like its own"
        )


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


def _seen(place: Path, dataset: Dataset, test: np.ndarray) -> int:
    """How many test examples the run that made a teacher did not seal, where it was made on this very data set."""
    for directory in (place, place.absolute().parent):
        if not (directory / "report.json").exists():
            continue
        finished = run.read_json(directory / "report.json")
        if finished["data"]["fingerprint"] != dataset.fingerprint:
            return 0
        theirs = _config_of(directory, finished)
        sealed = split_rows(dataset.labels, dataset.test_rows, seed=theirs.seed, fractions=theirs.splits)["test"]
        return len(np.setdiff1d(test, sealed))
    return 0
