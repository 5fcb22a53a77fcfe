"""The command line: parses options and delegates. Imports what is heavy only when a command runs, so that --help is fast."""

import atexit
import contextlib
import gc
import io
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from ev3_distill import config
from ev3_distill.cli.options import (
    DISTRIBUTED_SUITES,
    BenchCommand,
    CompressCommand,
    CopiesCommand,
    DistributedOptions,
    EvaluateCommand,
    ExportCommand,
    ReportCommand,
    TeachCommand,
)
from ev3_distill.config_file import ConfigT, check_unchanged, read_config, read_run_config
from ev3_distill.errors import InputError, RequirementError, warn
from ev3_distill.runtime import console, phases

# Thresholds of the garbage collector. Modules and traced programs are many long-lived objects; scanning them at the default
# thresholds takes 7% of a short run.
GC_THRESHOLDS = (100_000, 20, 50)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `ev3-distill`.

    Exit code 2 for bad input, with one message on standard error; 3 for a guard that is not certified or another requirement
    that is not met; 130 after Ctrl-C.
    """
    start = phases.process_start() if argv is None else None
    argv = sys.argv[1:] if argv is None else argv
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        with phases.command(start, phase="importing"):
            command = _parse(argv)
            _COMMANDS[type(command)](command)
    except InputError as error:
        print(f"ev3-distill: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RequirementError as error:
        print(f"ev3-distill: error: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run() -> None:
    """The command line as a process of its own: `main`, without 0.6 s in which Python takes all libraries apart at the end."""
    try:
        main()
        code: Any = 0
    except SystemExit as exit_:
        code = exit_.code
    several = "jax" in sys.modules and sys.modules["jax"].process_count() > 1
    others = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    if several or others or not isinstance(code, int | None):
        raise SystemExit(code)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a closed pipe, of which Python tells in its own way
        raise SystemExit(code) from None
    os._exit(code or 0)


def _parse(argv: list[str]) -> Any:
    name = argv[0] if argv else ""
    compress, teach = CompressCommand(), TeachCommand()
    if name == "compress":
        compress = CompressCommand(run=_defaults(config.Compress, argv))
    elif name == "teach":
        teach = TeachCommand(run=_defaults(config.Teach, argv))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                Annotated[CompressCommand, tyro.conf.subcommand("compress", default=compress)]
                | Annotated[TeachCommand, tyro.conf.subcommand("teach", default=teach)]
                | Annotated[EvaluateCommand, tyro.conf.subcommand("evaluate")]
                | Annotated[ReportCommand, tyro.conf.subcommand("report")]
                | Annotated[ExportCommand, tyro.conf.subcommand("export")]
                | Annotated[CopiesCommand, tyro.conf.subcommand("copies")]
                | Annotated[BenchCommand, tyro.conf.subcommand("bench")],
                prog="ev3-distill",
                description="Distill a big model into a small one, with a certificate.",
                args=argv,
            )
    except SystemExit as exit_:
        cause: BaseException | None = exit_
        while cause is not None:  # a rule of config.py, which tyro reports with internal names
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        sys.stderr.write(errors.getvalue())
        raise


def _defaults(kind: type[ConfigT], argv: list[str]) -> ConfigT:
    """Defaults of the options: the file of --config, the configuration of the run of --resume, or the built-in ones."""
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        value = value if equals else " ".join(argv[i + 1 : i + 2])
        if option == "--config" and value:
            return read_config(kind, Path(value))
        if option == "--resume" and value:
            return read_run_config(kind, Path(value))
    return kind()


def _run(command: CompressCommand | TeachCommand) -> None:
    """Starts or resumes a run of compress or teach, and prints its summary."""
    execution, name = command.execution, "compress" if isinstance(command, CompressCommand) else "teach"
    if execution.resume is not None:
        other = "--config" if execution.config else "--out" if execution.out else ""
        check_unchanged(execution.resume, command.run, other=other)
    directory = execution.resume or execution.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        with console.news(phases.clock()):
            several_processes = execution.start()
            _store_programs(execution.compile_cache and not several_processes)
            from ev3_distill.cli import commands, printing

            phases.clock().turn_to("other")
            start = commands.compress if isinstance(command, CompressCommand) else commands.teach
            result = start(
                command.run,  # type: ignore[arg-type]
                out=directory,
                resume=execution.resume is not None,
                devices=execution.devices or (None if several_processes else 1),
                spread=execution.spread,
                tensorboard=execution.tensorboard,
            )
    except KeyboardInterrupt:
        resume = f"resume with: ev3-distill {name} --resume {shlex.quote(str(directory))}"
        has_begun = (directory / "config.toml").exists()
        print(f"ev3-distill: interrupted; {resume if has_begun else 'nothing was written'}", file=sys.stderr)
        raise
    printing.print_result(result)
    _exit_by(result.guards)
    if result.guards and not result.useful:
        raise SystemExit(3)


def _store_programs(wanted: bool) -> None:
    """Opens the store of compiled programs, before the first one is compiled."""
    from ev3_distill.runtime import compile_cache

    if wanted and (reason := compile_cache.start()):
        warn(f"compiled programs are not stored: {reason}")


def _evaluate(command: EvaluateCommand) -> None:
    _store_programs(command.compile_cache)
    from ev3_distill.cli import printing

    if not printing.evaluate(command):
        raise SystemExit(3)


def _copies(command: CopiesCommand) -> None:
    from ev3_distill.cli import copies

    for line in copies.write_clusters(command.data, command.out, memory=command.memory):
        print(line)


def _exit_by(guards: list[dict[str, Any]]) -> None:
    """Exits with code 3 if a guard is not certified."""
    if not all(guard["certified"] for guard in guards):
        raise SystemExit(3)


def _report(command: ReportCommand) -> None:
    import rich

    if command.live:
        from ev3_distill.monitor import live

        if not live.follow(command.run):
            return

    from ev3_distill.monitor import report
    from ev3_distill.training.run_dir import read_json

    content = read_json(command.run / "report.json")
    page = report.write_html(command.run)
    rich.print(report.terminal_summary(content))
    print(f"Report: {page}")


def _export(command: ExportCommand) -> None:
    _store_programs(command.compile_cache)
    from ev3_distill.export import ExportConfig, export_run

    export_config = ExportConfig(
        command.format,
        pick=command.pick,
        layout=command.layout,
        softmax=command.softmax,
        int8=command.int8,
        license=command.teacher_licence,
        student=command.student,
        latency=command.latency,
        trust_run=command.trust_run,
    )
    for line in export_run(command.run, command.out, export_config):
        print(line)


def _bench(command: BenchCommand) -> None:
    if command.compare or command.render:
        _compare_or_render(command)
        return
    if not command.suite:
        raise InputError("bench needs a suite, --compare or --render; got none: name one, as in bench speed")
    one_process = DistributedOptions(command.processes, command.coordinator, command.process_id) == DistributedOptions()
    if command.suite not in DISTRIBUTED_SUITES and not one_process:
        raise InputError(
            f"suites that several processes can share are {', '.join(DISTRIBUTED_SUITES)}; got '{command.suite}': run it "
            "in one process"
        )
    command.start()
    from ev3_distill import benchmarks
    from ev3_distill.runtime import distributed

    with distributed.watch_peers():
        benchmarks.run_suite(
            command.suite,
            seeds=command.seeds,
            size=command.size,
            out=command.out,
            only=command.only,
            keep_rows=command.keep_rows,
        )


def _compare_or_render(command: BenchCommand) -> None:
    """Reports on measured rows, without measuring."""
    out = command.out if command.compare else None
    if command != BenchCommand(compare=command.compare, out=out) and command != BenchCommand(render=command.render):
        raise InputError("--compare takes only --out besides, and --render nothing; got more options: omit the rest")
    from ev3_distill import benchmarks

    if command.compare:
        benchmarks.compare_results(*command.compare, out=command.out)
    else:
        benchmarks.render_results(command.render)


_COMMANDS: dict[type, Callable[[Any], None]] = {
    CompressCommand: _run,
    TeachCommand: _run,
    EvaluateCommand: _evaluate,
    CopiesCommand: _copies,
    ReportCommand: _report,
    ExportCommand: _export,
    BenchCommand: _bench,
}
