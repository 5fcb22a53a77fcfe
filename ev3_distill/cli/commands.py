"""Composes runs of compress and teach from data, teacher, student and arms; the command line and Python call these."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ev3_distill import students
from ev3_distill.arms import label_arm_name
from ev3_distill.config import Compress, Preprocessing, RunConfig, Teach
from ev3_distill.config_file import ConfigT, check_unchanged, read_run_config
from ev3_distill.data.class_names import name_classes
from ev3_distill.data.sources import Dataset
from ev3_distill.errors import InputError, warn
from ev3_distill.monitor import background
from ev3_distill.monitor.sentences import alarm_of
from ev3_distill.runtime import distributed, phases, user_code
from ev3_distill.search import first_network, run_search
from ev3_distill.students import feature_shapes
from ev3_distill.teachers import Teacher, load_logits, load_recorded, load_teacher, save_logits
from ev3_distill.teachers.targets import BATCH, BlankTargets, CachedTargets, RecordedTargets, TeacherTargets
from ev3_distill.training import run_dir, teacher_checks
from ev3_distill.training.devices import BATCH as BATCH_SPREAD
from ev3_distill.training.devices import ONE, Devices, devices_of
from ev3_distill.training.label_checks import describe_labels, require_labels
from ev3_distill.training.memory import eval_batch_size, return_freed_memory
from ev3_distill.training.run_reader import check_joint_strata, data_of, report_in, trained_seconds
from ev3_distill.training.setup import InStepTeacher, TrainingSetup, classification_setup
from ev3_distill.training.student_setup import prepare_student, warn_of_duplicates
from ev3_distill.training.train import train

LOGITS = "logits.npz"  # copy of recorded teacher logits in a run directory


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
      directory: of the run; holds all its files.
      report: content of report.json.
    """

    directory: Path
    report: dict[str, Any]

    @property
    def student(self) -> Path:
        """Folder of the delivered student; `load_student` takes it."""
        return self.directory / "student"

    @property
    def page(self) -> Path:
        """The report as an HTML page."""
        return self.directory / "report.html"

    @property
    def guards(self) -> list[dict[str, Any]]:
        """The outcome of each guard: guard, metric, point, bound, certified."""
        return list(self.report.get("guards", []))

    @property
    def certified(self) -> bool:
        """Whether the certificate proves every guard."""
        return all(guard["certified"] for guard in self.guards)

    @property
    def useful(self) -> bool:
        """Whether the student is clearly better than a constant answer and not far below its teacher."""
        return alarm_of(self.report) is None


def compress(
    config: Compress | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    devices: int | None = 1,
    spread: str = BATCH_SPREAD,
    tensorboard: Path | None = None,
    **options: Any,
) -> RunResult:
    """Distills a teacher into a small student with a certificate: what the command `ev3-distill compress` runs.

        result = ev3_distill.compress(data="npz:data.npz", teacher="onnx:big.onnx", guards=("accuracy >= 0.9",), out="run")
        network, variables = ev3_distill.load_student(result.student)

    All that can be checked is checked before anything is written.

    Args:
      config: of the run; the default configuration if omitted. Of a resumed run, that of the run.
      out: the run directory: new or empty, or that of the run to resume.
      resume: continue the run in `out`, exactly where it stopped.
      devices: number of devices to use; None: all.
      spread: what to distribute over several devices: "batch" or "arms".
      tensorboard: directory for TensorBoard event files.
      **options: fields of Compress that override those of `config`.

    Raises:
      InputError: bad input; the message says what to do.
    """
    directory = Path(out)
    config = _configure(Compress, config, options, directory, resume=resume)
    if resume and (finished := _finished(directory, config)):
        return finished
    with _session(directory, devices=devices, spread=spread, tensorboard=tensorboard, resume=resume) as (
        own,
        placement,
    ):
        return RunResult(directory, _compress(own, config, resume=resume, devices=placement))


def teach(
    config: Teach | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    devices: int | None = 1,
    spread: str = BATCH_SPREAD,
    tensorboard: Path | None = None,
    **options: Any,
) -> RunResult:
    """Trains a teacher on labels alone: what the command `ev3-distill teach` runs. Takes what `compress` takes."""
    directory = Path(out)
    config = _configure(Teach, config, options, directory, resume=resume)
    if resume and (finished := _finished(directory, config)):
        return finished
    with _session(directory, devices=devices, spread=spread, tensorboard=tensorboard, resume=resume) as (
        own,
        placement,
    ):
        dataset = _load_data(own, config, resume=resume)
        require_labels(dataset, "teach")
        setup = classification_setup(config, config.network, dataset, dataset.num_classes, placement)
        setup = warn_of_duplicates(setup)
        if resume:
            run_dir.read_inputs(own, dataset.fingerprint, dataset.class_names)
        return RunResult(directory, _teach(own, config, setup, resume=resume))


def _configure(
    kind: type[ConfigT], config: ConfigT | None, options: dict[str, Any], directory: Path, *, resume: bool
) -> ConfigT:
    if config is None:
        config = read_run_config(kind, directory) if resume else kind()
    config = dataclasses.replace(config, **options)
    if resume:
        check_unchanged(directory, config)
    return config


def _finished(directory: Path, config: RunConfig) -> RunResult | None:
    """The result of a run that needs no more training, which also needs neither its data nor its teacher."""
    if jax.process_count() > 1 or not (directory / "report.json").exists():
        return None
    with _opened(directory, config, {}, resume=True) as report:
        return RunResult(directory, report) if report else None


@contextlib.contextmanager
def _session(
    directory: Path, *, devices: int | None, spread: str, tensorboard: Path | None, resume: bool
) -> Iterator[tuple[Path, Devices]]:
    """What surrounds a run: its clock, devices and other processes, the writer for TensorBoard, and errors of a full disk.

    Yields:
      The directory in which this process works, and the devices.
    """
    placement = ONE if devices == 1 == jax.process_count() else devices_of(devices, spread=spread)
    with contextlib.ExitStack() as stack:
        clock = stack.enter_context(phases.command())
        phases.count_compiling()
        if resume:
            clock.add_earlier(trained_seconds(directory))
            stack.enter_context(user_code.announced(str(directory / "config.toml")))
        stack.enter_context(distributed.watch_peers())
        own = stack.enter_context(distributed.process_directory(directory))
        if tensorboard is not None and distributed.is_first_process():
            from ev3_distill.monitor.tensorboard import write_tensorboard

            stack.enter_context(write_tensorboard(directory, tensorboard))
        stack.enter_context(run_dir.explain_full_disk(own))
        with background.pages():
            yield own, placement
            clock.turn_to("writing")
        clock.turn_to("other")


def _load_data(directory: Path, config: RunConfig, *, resume: bool) -> Dataset:
    if not resume:
        run_dir.refuse_occupied(directory)
    check_joint_strata(directory, config, resume=resume)
    return_freed_memory(config.memory)
    with phases.phase("reading"):
        dataset = data_of(config)
        describe_labels(dataset)
    return dataset


def _inputs(dataset: Dataset) -> dict[str, Any]:
    """What a run records of its inputs at the start, see `run_dir.read_inputs`."""
    return {"fingerprint": dataset.fingerprint, "class_names": list(dataset.class_names), "teacher": None}


@contextlib.contextmanager
def _opened(
    directory: Path, config: RunConfig, inputs: dict[str, Any], *, resume: bool
) -> Iterator[dict[str, Any] | None]:
    """Locks the run directory, which is created if the run is new; yields the report of a run that is finished already."""
    with run_dir.lock_run(directory, make=not resume):
        if not resume:
            run_dir.create(directory, config, inputs)
        yield report_in(directory)
        if (directory / "report.json").exists() and not (directory / "report.html").exists():
            background.write_page(directory)


def _compress(directory: Path, config: Compress, *, resume: bool, devices: Devices) -> dict[str, Any]:
    dataset = _load_data(directory, config, resume=resume)
    inputs = _inputs(dataset)
    if resume:
        inputs = run_dir.read_inputs(directory, dataset.fingerprint, dataset.class_names)
    if not config.teacher:
        return _with_new_teacher(directory, config, dataset, inputs, resume=resume, devices=devices)
    if config.teacher.startswith("logits:"):
        return _with_recorded_teacher(directory, config, dataset, inputs, resume=resume, devices=devices)
    with phases.phase("teacher"):
        teacher = _load_teacher(config.teacher, config, dataset)
        teacher_checks.warn_if_trained_on_test(config, dataset)
        dataset = name_classes(dataset, teacher.class_names or ())
        outputs = teacher.outputs(dataset.inputs[:1])
    num_classes = dataset.num_classes or teacher.num_classes or outputs["logits"].shape[1]
    shapes = {name: rows.shape[1:] for name, rows in outputs.items() if name != "logits"}
    setup, arms = _student(config, dataset, num_classes, shapes, devices=devices)
    if resume:
        teacher_checks.check_unchanged(teacher, inputs["teacher"]["digest"], directory)
    else:
        inputs["teacher"] = {"digest": teacher.digest, "params": teacher.params}
        with phases.phase("teacher"):
            teacher_checks.check_quality(teacher, setup, as_is=config.teacher_as_is)
    with _opened(directory, config, inputs, resume=resume) as finished:
        return finished or _with_running_teacher(directory, config, setup, arms, teacher, source=config.teacher)


def _with_new_teacher(
    directory: Path, config: Compress, dataset: Dataset, inputs: dict[str, Any], *, resume: bool, devices: Devices
) -> dict[str, Any]:
    """Trains a teacher first, then the student."""
    teacher_config = config.teacher_config()
    require_labels(dataset, "a teacher that is trained here")
    teacher_setup = classification_setup(teacher_config, teacher_config.network, dataset, dataset.num_classes, devices)
    setup, arms = _student(config, dataset, dataset.num_classes, feature_shapes(teacher_setup.network), devices=devices)
    with _opened(directory, config, inputs, resume=resume) as finished:
        if finished:
            return finished
        own = directory / "teacher"
        with phases.phase("teacher"):
            _teach(own, teacher_config, teacher_setup, resume=(own / "config.toml").exists())
            features = "#" + ",".join(setup.teacher_features) if setup.teacher_features else ""
            load = functools.partial(students.load, factory=students.import_factory(config.teacher_network))
            teacher = _load_teacher(f"flax:{own}{features}", config, dataset, load_network=load)
        source = f"trained here: {config.teacher_network}"
        return _with_running_teacher(directory, config, setup, arms, teacher, source=source)


def _with_recorded_teacher(
    directory: Path, config: Compress, dataset: Dataset, inputs: dict[str, Any], *, resume: bool, devices: Devices
) -> dict[str, Any]:
    """Trains the student on recorded logits, of which the run keeps a copy."""
    copy = directory / LOGITS
    with phases.phase("teacher"):
        recorded = load_logits(
            copy if copy.exists() else config.teacher.partition(":")[2],
            rows=len(dataset.labels),
            test_rows=dataset.test_rows,
            fingerprint=dataset.fingerprint,
        )
    options = Preprocessing() if copy.exists() else config.teacher_input  # the copy holds the final logits
    teacher = load_recorded(
        recorded,
        config.teacher,
        preprocessing=options,
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
    )
    logits = teacher_checks.outputs_of_all(teacher, recorded)
    config = dataclasses.replace(config, augment="none") if config.augment == "auto" else config
    setup, arms = _student(config, dataset, logits.shape[1], {}, devices=devices)
    if not resume:
        teacher_checks.check_quality(teacher, setup, as_is=config.teacher_as_is, recorded=recorded)
    with _opened(directory, config, inputs, resume=resume) as finished:
        if finished:
            return finished
        if not copy.exists():
            save_logits(copy, logits, dataset.fingerprint)
        facts = {"source": config.teacher, "params": None}
        return _search_or_train(directory, config, setup, arms, RecordedTargets({"logits": logits}), teacher=facts)


def _with_running_teacher(
    directory: Path, config: Compress, setup: TrainingSetup, arms: Sequence[str], teacher: Teacher, *, source: str
) -> dict[str, Any]:
    """Trains the student under a teacher that can run."""
    in_step = None
    if config.teacher_in_step:
        if teacher.network is None or teacher.variables is None:
            raise InputError(
                "a teacher inside the training step must be a flax teacher that takes the data without preprocessing; got "
                f"{teacher.source}: omit --teacher-in-step"
            )
        in_step = InStepTeacher(teacher.network, teacher.variables)
    targets = CachedTargets(
        teacher,
        setup.dataset,
        task=setup.task,
        features=tuple(setup.teacher_features),
        precision=config.precision,
        batch_size=eval_batch_size(setup.dataset, setup.memory, BATCH),
        warn=warn,
    )
    with contextlib.closing(targets):
        facts = {"source": source, "params": teacher.params}
        return _search_or_train(directory, config, setup, arms, targets, teacher=facts, in_step=in_step)


def _search_or_train(
    directory: Path,
    config: Compress,
    setup: TrainingSetup,
    arms: Sequence[str],
    targets: TeacherTargets,
    *,
    teacher: dict[str, Any],
    in_step: InStepTeacher | None = None,
) -> dict[str, Any]:
    if config.searches:
        return run_search(directory, config, setup, arms, targets, teacher=teacher)
    if config.control:
        own = directory / "control"
        control_setup = dataclasses.replace(setup, teacher_features={}, guards=())
        _teach(own, config.control_config(), control_setup, resume=(own / "config.toml").exists())
        setup = dataclasses.replace(setup, control=own)
    return train(directory, config, setup, arms, targets, teacher=teacher, in_step=in_step)


def _teach(directory: Path, config: Teach, setup: TrainingSetup, *, resume: bool) -> dict[str, Any]:
    """Trains a network on labels alone."""
    with _opened(directory, config, _inputs(setup.dataset), resume=resume) as finished:
        if finished:
            return finished
        targets = BlankTargets(len(setup.dataset.labels), setup.task.teacher_spec)
        return train(directory, config, setup, [label_arm_name(setup.network.spec)], targets, teacher=None)


def _student(
    config: Compress,
    dataset: Dataset,
    num_classes: int,
    feature_shapes: Mapping[str, tuple[int, ...]],
    *,
    devices: Devices,
) -> tuple[TrainingSetup, list[str]]:
    """The setup of the student, or of the first student of a search, and its arms."""
    with phases.phase("reading"):  # deals the splits and looks for copies
        setup = classification_setup(config, config.student, dataset, num_classes, devices)
        if config.searches:
            setup = dataclasses.replace(setup, network=first_network(config, setup.network.spec))
        return prepare_student(config, setup, feature_shapes)


def _load_teacher(
    name: str, config: Compress, dataset: Dataset, load_network: Callable[..., Any] = students.load
) -> Teacher:
    return load_teacher(
        name,
        preprocessing=config.teacher_input,
        input_shape=dataset.inputs.shape[1:],
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        load_network=load_network,
        offset=dataset.offset,
    )
