"""The command line: parses, composes, delegates. Heavy imports wait until a command runs, so that --help answers at once."""

import contextlib
import dataclasses
import gc
import io
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from ev3_distill import config
from ev3_distill.config_file import ConfigT, read_config, read_run_config
from ev3_distill.errors import InputError

SPREAD_SUITES = ("evolution", "protonet")
# Of the garbage collector: modules and traced programs are many objects that live long, and to look through them at its usual
# pace takes 7 % of a short run.
PACE = (20_000, 20, 50)


@dataclasses.dataclass(frozen=True)
class _Group:
    processes: str = "1"
    """That work together, each started by this command: a number, or auto where the cluster tells it (SLURM, Kubernetes, Cloud
    TPU, MPI). Of bench: for evolution and protonet."""
    coordinator: str | None = None
    """HOST:PORT where process 0 listens and that all of them reach."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    def start(self) -> bool:
        """Joins the processes, before anything asks JAX for its devices; whether there are several."""
        from ev3_distill.runtime import distributed

        if (self.processes, self.coordinator, self.process_id) == ("1", None, None):
            return False
        return distributed.start(self.processes, self.coordinator, self.process_id)[1] > 1


@dataclasses.dataclass(frozen=True)
class _Where(_Group):
    config: Path | None = None
    """TOML file of options; those on the command line override it."""
    out: Path | None = None
    """New run directory; by default one under runs/, named by the time."""
    resume: Path | None = None
    """Go on with this run, exactly where it was."""
    tensorboard: Path | None = None
    """Write what the ledger tells there for TensorBoard too; needs ev3-distill[tensorboard]."""
    devices: int = 0
    """That share the work; 0 for one, or for all where several processes share it."""
    spread: str = "batch"
    """Over devices: batch (a part of each batch on each device) or arms (those of one iteration side by side)."""


@dataclasses.dataclass(frozen=True)
class CompressCommand(_Where):
    """Distil a teacher into a small student, with a certificate."""

    run: tyro.conf.OmitArgPrefixes[config.Compress] = dataclasses.field(default_factory=config.Compress)


@dataclasses.dataclass(frozen=True)
class TeachCommand(_Where):
    """Train a teacher from a recipe and save it."""

    run: tyro.conf.OmitArgPrefixes[config.Teach] = dataclasses.field(default_factory=config.Teach)


@dataclasses.dataclass(frozen=True)
class EvaluateCommand:
    """Score the student of a finished run, or an exported file as it is, with exact bounds."""

    run: tyro.conf.Positional[Path]
    """A run directory; or a file that export wrote, or its folder."""
    data: str = ""
    """Source of examples, scored as a whole, as --data of compress; the run's own sealed split where none is named."""
    confidence: float | None = None
    """Of all bounds together; by default 0.95, or the run's own on its own sealed split."""
    student: str = ""
    """The MODULE:FACTORY that made the student, where it is your own: no code is imported because a run names it."""
    guard: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What must hold on these examples, as --guard of compress: exit code 3 where it is not proven."""
    costs: str = ""
    """CSV file of costs, as --costs of compress."""
    reopen: bool = False
    """Open the run's sealed split again for other claims than its certificate's; their bounds are corrected for it."""
    of: Path | None = None
    """The run that a file is of: its answers are compared with the student's, example by example."""
    threads: int = 0
    """That a file may compute with; 0 for as many as there are processors."""


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Print the report of a finished run and render its page anew, or follow a run."""

    run: tyro.conf.Positional[Path]
    """A run directory."""
    live: bool = False
    """Follow a run that another process works in, until it is finished or that process is gone."""


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """Hand out a student of a finished run: the one it delivered, or another of those that a search tried."""

    run: tyro.conf.Positional[Path]
    """A run directory."""
    out: Path
    """New folder for the student, with evidence.json and MODEL_CARD.md."""
    format: str = "flax"
    """flax: its variables as safetensors, the program that applies them, and what --teacher flax:DIR takes; onnx or
    stablehlo: a file that others run."""
    pick: str = ""
    """Conditions on params, accuracy or bound such as 'params<=20000': of the students that meet them, the one with the
    highest bound on decide."""
    layout: str = "nhwc"
    """Where the file wants an example's last axis: nhwc, as the data have it, or nchw."""
    softmax: bool = False
    """Let the file give probabilities in the place of logits."""
    int8: bool = False
    """Weights and activations of an ONNX file in int8, fitted to examples of the explore split."""
    teacher_licence: str = "unknown"
    """Told in the file and its model card."""
    student: str = ""
    """The MODULE:FACTORY that made the student, as --student of evaluate."""
    latency: bool = False
    """Time the file, and the run's teacher where it can run, on this machine as it is now, for the model card."""


@dataclasses.dataclass(frozen=True)
class BenchCommand(_Group):
    """Measure the tool itself: rows, a table, a page, how to reproduce them, and what changed since."""

    suite: tyro.conf.Positional[str] = ""
    """coverage, evolution, growth, guards, hypergrad, int8, memory, portfolio, protonet, pytorch, quality, rescue, rotation,
    safety, search, speed, sweeps, throughput or tuning."""
    seeds: int = 10
    """Repetitions."""
    size: str = "full"
    """full, or smoke for a quick look that proves nothing."""
    out: Path | None = None
    """Directory for rows, table and page; printed only where none is named. Of --compare: an HTML file."""
    compare: tuple[Path, Path] | None = None
    """Measure nothing; tell what changed beyond noise from one such directory to another."""
    render: tuple[Path, ...] = ()
    """Measure nothing; write the tables, plots and pages of such directories anew."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `ev3-distill`.

    Exit code 2 where the input is bad, told on standard error; 3 where a guard is not certified; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    gc.set_threshold(*PACE)
    try:
        command = _parse(argv)
        if isinstance(command, CompressCommand):
            _execute("compress", command, command.run)
        elif isinstance(command, TeachCommand):
            _execute("teach", command, command.run)
        elif isinstance(command, EvaluateCommand):
            _evaluate(command)
        elif isinstance(command, ReportCommand):
            _report(command)
        elif isinstance(command, ExportCommand):
            _export(command)
        else:
            _bench(command)
    except InputError as error:
        print(f"ev3-distill: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _parse(argv: list[str]) -> Any:
    name = argv[0] if argv else ""
    compress, teach = CompressCommand(), TeachCommand()
    if name == "compress":
        compress = CompressCommand(run=_defaults(config.Compress, argv))
    elif name == "teach":
        teach = TeachCommand(run=_defaults(config.Teach, argv))
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                Annotated[CompressCommand, tyro.conf.subcommand("compress", default=compress)]
                | Annotated[TeachCommand, tyro.conf.subcommand("teach", default=teach)]
                | Annotated[EvaluateCommand, tyro.conf.subcommand("evaluate")]
                | Annotated[ReportCommand, tyro.conf.subcommand("report")]
                | Annotated[ExportCommand, tyro.conf.subcommand("export")]
                | Annotated[BenchCommand, tyro.conf.subcommand("bench")],
                prog="ev3-distill",
                description="Make a big model small, with a promise that holds.",
                args=argv,
            )
    except SystemExit as exit_:
        cause: BaseException | None = exit_
        while cause is not None:  # a rule of config.py, which tyro tells with names of its own inside
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        sys.stderr.write(told.getvalue())
        raise


def _defaults(kind: type[ConfigT], argv: list[str]) -> ConfigT:
    """What the options default to: the file after --config, the configuration of the run after --resume, or the built-in."""
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        value = value if equals else " ".join(argv[i + 1 : i + 2])
        if option == "--config" and value:
            return read_config(kind, Path(value))
        if option == "--resume" and value:
            return read_run_config(kind, Path(value))
    return kind()


def _execute(name: str, where: _Where, chosen: config.Compress | config.Teach) -> None:
    """Starts or resumes a run of compress or teach, and prints its summary."""
    if where.resume is not None:
        stored = read_run_config(type(chosen), where.resume)
        changed = [f.name for f in dataclasses.fields(stored) if getattr(stored, f.name) != getattr(chosen, f.name)]
        if changed or where.config or where.out:
            told = ", ".join(changed) or ("--config" if where.config else "--out")
            raise InputError(
                f"a resumed run keeps its configuration; got another {told}: resume without it, or start anew with --out"
            )
        directory = where.resume
    else:
        directory = where.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    several = where.start()
    try:
        with contextlib.ExitStack() as stack:
            result = _run(where, chosen, directory, several, stack)
    except KeyboardInterrupt:
        begun = (directory / "config.toml").exists()
        way_on = (
            f"go on with: ev3-distill {name} --resume {shlex.quote(str(directory))}" if begun else "nothing was written"
        )
        print(f"ev3-distill: interrupted; {way_on}", file=sys.stderr)
        raise
    _exit_by(result.get("guards", []))


def _run(
    where: _Where, chosen: config.Compress | config.Teach, directory: Path, several: bool, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """The run, and its summary; returns the content of report.json."""
    from ev3_distill.runtime import distributed
    from ev3_distill.training.devices import ONE, devices_of

    devices = devices_of(where.devices or None, spread=where.spread) if several or where.devices > 1 else ONE
    stack.enter_context(distributed.joined())
    own = stack.enter_context(distributed.own_directory(directory))
    from ev3_distill.cli import commands
    from ev3_distill.monitor import report

    if where.tensorboard is not None and distributed.first():
        from ev3_distill.monitor.tensorboard import written_for_tensorboard

        stack.enter_context(written_for_tensorboard(directory, where.tensorboard))
    run = commands.compress if isinstance(chosen, config.Compress) else commands.teach
    result: dict[str, Any] = run(own, chosen, resume=where.resume is not None, devices=devices)  # type: ignore[arg-type]
    import rich

    rich.print(report.summary(result))
    print(f"Student: {directory / 'student'}\nReport:  {directory / 'report.html'}")
    return result


def _evaluate(command: EvaluateCommand) -> None:
    from ev3_distill.export import evaluate
    from ev3_distill.export.formats.runtime import file_in
    from ev3_distill.monitor import report

    asked: dict[str, Any] = {
        "student": command.student,
        "guards": command.guard,
        "costs": command.costs,
        "reopen": command.reopen,
    }
    if path := file_in(command.run):
        of_file = evaluate.evaluate_file(
            path, command.data, of=command.of, threads=command.threads, confidence=command.confidence, **asked
        )
        certificate, guards = of_file.certificate, of_file.guards
        print("\n".join(of_file.lines))
    elif command.of or command.threads:
        raise InputError(f"--of and --threads are about an exported file; got {command.run}: leave them out")
    else:
        certificate, guards = evaluate.evaluate(command.run, command.data, command.confidence, **asked)
    told = certificate.as_dict()
    for claim in told["claims"]:
        print(report.claim_line(claim, told["confidence"]))
    if said := report.corrected(told):
        print(f"{said}.")
    for guard in guards:
        print(report.verdict(guard))
    _exit_by(guards)


def _exit_by(guards: list[dict[str, Any]]) -> None:
    """Exit code 3 where a guard is not certified."""
    if not all(guard["certified"] for guard in guards):
        raise SystemExit(3)


def _report(command: ReportCommand) -> None:
    import rich

    directory = command.run
    if command.live:
        from ev3_distill.monitor import live

        if not live.follow(directory):
            return

    from ev3_distill.monitor import report
    from ev3_distill.training.run_dir import read_json

    content = read_json(directory / "report.json")
    page = report.write_html(directory)
    rich.print(report.summary(content))
    print(f"Report: {page}")


def _export(command: ExportCommand) -> None:
    from ev3_distill.export.export import Wanted, export

    wanted = Wanted(
        command.format,
        pick=command.pick,
        layout=command.layout,
        softmax=command.softmax,
        int8=command.int8,
        licence=command.teacher_licence,
        student=command.student,
        latency=command.latency,
    )
    for line in export(command.run, command.out, wanted):
        print(line)


def _bench(command: BenchCommand) -> None:
    if command.compare or command.render:
        _tell(command)
        return
    if not command.suite:
        raise InputError(
            "bench measures a suite, or takes --compare or --render; got none: name one, as in bench speed"
        )
    if (
        command.suite not in SPREAD_SUITES
        and _Group(command.processes, command.coordinator, command.process_id) != _Group()
    ):
        raise InputError(
            f"suites whose work several processes share are {', '.join(SPREAD_SUITES)}; got '{command.suite}': run it in one"
        )
    command.start()
    from ev3_distill import benchmarks
    from ev3_distill.runtime import distributed

    with distributed.joined():
        benchmarks.run(command.suite, seeds=command.seeds, size=command.size, out=command.out)


def _tell(command: BenchCommand) -> None:
    """What rows that are there say."""
    out = command.out if command.compare else None
    if command != BenchCommand(compare=command.compare, out=out) and command != BenchCommand(render=command.render):
        raise InputError("--compare takes --out alone beside it, and --render nothing; got more: leave the rest out")
    from ev3_distill import benchmarks

    if command.compare:
        benchmarks.changes(*command.compare, out=command.out)
    else:
        benchmarks.render(command.render)
