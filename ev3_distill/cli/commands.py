"""What the commands do: compose data, teacher, student, arms and core into a run. The heavy half of the command line."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ev3_distill import config, students
from ev3_distill.arms import BY_PEERS, arms_named, default_names, features_asked, name_for_labels
from ev3_distill.data.sources import Dataset
from ev3_distill.data.splits import shared, split_rows
from ev3_distill.errors import InputError, warn
from ev3_distill.search.search import search
from ev3_distill.students.network import count_params, features_of
from ev3_distill.tasks.classification import metric_bounds
from ev3_distill.teachers import Teacher, load_logits, load_teacher, save_logits
from ev3_distill.teachers.diagnosis.diagnose import diagnose
from ev3_distill.teachers.targets import BATCH, Labels, Lessons, Recorded
from ev3_distill.training import run_dir
from ev3_distill.training.certify_run import known_of
from ev3_distill.training.devices import ONE, Devices
from ev3_distill.training.guard_checks import check_labelled, guards_of
from ev3_distill.training.run_reader import config_of, data_of, report_in
from ev3_distill.training.setup import Task, bytes_of_example, checked, evaluated_at_once, give_back
from ev3_distill.training.train import train
from ev3_distill.types import Network

SHOWN = 4096  # held-out examples that show whether a teacher is any good, at most,
SHOWN_SHARE = 32  # and this share of the memory limit


def compress(directory: Path, chosen: config.Compress, *, resume: bool, devices: Devices = ONE) -> dict[str, Any]:
    """Runs `compress` to its end, or on from where it was, spread over `devices`; returns the content of report.json.

    All that can be checked is checked before anything is written.
    """
    if not resume:
        run_dir.refuse_occupied(directory)
    with run_dir.room_on_disk(directory):
        return _compress(directory, chosen, resume=resume, devices=devices)


def _compress(directory: Path, chosen: config.Compress, *, resume: bool, devices: Devices) -> dict[str, Any]:
    give_back(chosen.memory)
    dataset = data_of(chosen)
    given: dict[str, Any] = {"fingerprint": dataset.fingerprint, "teacher": None}
    if resume:
        given = run_dir.given_to(directory, dataset.fingerprint)
    if not chosen.teacher:
        return _with_own_teacher(directory, chosen, dataset, given, resume=resume, devices=devices)
    if chosen.teacher.startswith("logits:"):
        return _with_recorded(directory, chosen, dataset, given, resume=resume, devices=devices)
    teacher, classes = _teacher(chosen, dataset)
    shapes = {name: rows.shape[1:] for name, rows in teacher.outputs(dataset.inputs[:1]).items() if name != "logits"}
    task, arms = _task(chosen, dataset, classes, shapes, devices=devices)
    if resume:
        _check_same(teacher, given["teacher"], directory)
    else:
        given["teacher"] = {"digest": teacher.digest, "params": teacher.params}
        _check_good(teacher, chosen, task)
    with _begun(directory, chosen, given, resume=resume) as finished:
        return finished or _distil(directory, chosen, task, arms, teacher, source=chosen.teacher)


def _with_own_teacher(
    directory: Path, chosen: config.Compress, dataset: Dataset, given: dict[str, Any], *, resume: bool, devices: Devices
) -> dict[str, Any]:
    """The run in which a teacher is trained first."""
    recipe = _recipe(chosen, chosen.teacher_network, chosen.teacher_budget)
    check_labelled(dataset, "a teacher that is trained here")
    of_teacher = checked(recipe, recipe.network, dataset, dataset.num_classes, devices)
    task, arms = _task(chosen, dataset, dataset.num_classes, features_of(of_teacher.network), devices=devices)
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
    directory: Path, chosen: config.Compress, dataset: Dataset, given: dict[str, Any], *, resume: bool, devices: Devices
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
    task, arms = _task(chosen, dataset, logits.shape[1], {}, devices=devices)
    with _begun(directory, chosen, given, resume=resume) as finished:
        if finished:
            return finished
        if not kept.exists():
            save_logits(kept, logits, dataset.fingerprint)
        facts = {"source": chosen.teacher, "params": None}
        if chosen.searches:
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
        if chosen.searches:
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


def teach(directory: Path, chosen: config.Teach, *, resume: bool, devices: Devices = ONE) -> dict[str, Any]:
    """Runs `teach`: the same run, with one arm that follows the labels alone; returns the content of report.json."""
    if not resume:
        run_dir.refuse_occupied(directory)
    give_back(chosen.memory)
    dataset = data_of(chosen)
    check_labelled(dataset, "teach")
    task = checked(chosen, chosen.network, dataset, dataset.num_classes, devices)
    _warn_of_duplicates(task)
    if resume:
        run_dir.given_to(directory, dataset.fingerprint)
    with run_dir.room_on_disk(directory):
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
    with run_dir.held(directory, make=not resume):
        if not resume:
            run_dir.create(directory, chosen, given)
        yield report_in(directory)


def _task(
    chosen: config.Compress,
    dataset: Dataset,
    num_classes: int,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    devices: Devices,
) -> tuple[Task, list[str]]:
    """The student's task and its arms; `shapes` are those of the teacher's features, of which the arms ask for some."""
    task = checked(chosen, chosen.student, dataset, num_classes, devices)
    if chosen.searches:
        task = dataclasses.replace(task, network=_smallest(chosen, task.network.spec))
    task = dataclasses.replace(task, network=students.deployed(task.network, chosen.deploy))
    _warn_of_duplicates(task)
    costs = metric_bounds.read_costs(path, num_classes) if (path := chosen.costs) else None
    known = known_of(jax.eval_shape(task.network.init, jax.random.key(0)))
    guards = guards_of(chosen.guards, dataset, num_classes=num_classes, known=known, costs=costs)
    labelled = bool((dataset.labels >= 0).any())
    if chosen.control:
        check_labelled(dataset, "a control that learns by labels alone")
    names = chosen.arms or default_names(task.network.spec, labels=labelled, goals=[guard.metric for guard in guards])
    if by_peers := [name for name in names if name in BY_PEERS]:
        raise InputError(f"only a search has peers to learn from; got the arm '{by_peers[0]}': leave it out")
    if chosen.tune:
        check_labelled(dataset, "an arm that tunes its loss")
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


def _seen(place: Path, dataset: Dataset, test: np.ndarray) -> int:
    """How many test examples the run that made a teacher did not seal, where it was made on this very data set."""
    for directory in (place, place.absolute().parent):
        if not (directory / "report.json").exists():
            continue
        finished = run_dir.read_json(directory / "report.json")
        if finished["data"]["fingerprint"] != dataset.fingerprint:
            return 0
        theirs = config_of(directory, finished)
        sealed = split_rows(dataset.labels, dataset.test_rows, seed=theirs.seed, fractions=theirs.splits)["test"]
        return len(np.setdiff1d(test, sealed))
    return 0
