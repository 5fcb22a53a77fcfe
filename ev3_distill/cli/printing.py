"""What commands print on standard output: the summary of a run, and the claims about a student that is evaluated."""

from ev3_distill.cli.commands import RunResult
from ev3_distill.cli.options import EvaluateCommand
from ev3_distill.errors import InputError
from ev3_distill.monitor import report
from ev3_distill.monitor.number_format import duration
from ev3_distill.monitor.sentences import claim_line, correction_sentence, guard_line, units_sentence
from ev3_distill.runtime import distributed, phases


def print_result(result: RunResult) -> None:
    """Prints the summary of a run; in a multi-process run, the first process does."""
    if not distributed.is_first_process():
        return
    import rich

    rich.print(report.terminal_summary(result.report))
    times = phases.clock().times()
    spent = ", ".join(
        f"{name} {duration(seconds)}" for name, seconds in times["phases"].items() if seconds >= phases.SHOWN_S
    )
    print(f"Student: {result.student}\nReport:  {result.page}\nTime:    {duration(times['wall_s'])}: {spent}")


def evaluate(options: EvaluateCommand) -> bool:
    """Scores a finished run or an exported file and prints the outcome; returns whether all that was asked is certified."""
    from ev3_distill.export import EvaluationConfig, evaluate_file, evaluate_run, find_model_file

    settings = EvaluationConfig(
        data=options.data,
        confidence=options.confidence,
        student=options.student,
        guards=options.guard,
        costs=options.costs,
        reopen=options.reopen,
        keep_overlap=options.keep_overlap,
        trust_run=options.trust_run,
    )
    if path := find_model_file(options.run):
        result = evaluate_file(path, settings, run=options.of, threads=options.threads)
        certificate, guards = result.certificate, result.guards
        print("\n".join(result.lines))
    elif options.of or options.threads:
        raise InputError(f"--of and --threads are about an exported file; got {options.run}: omit them")
    else:
        certificate, guards = evaluate_run(options.run, settings)
    content = certificate.as_dict()
    for claim in content["claims"]:
        print(claim_line(claim, content))
    for sentence in (units_sentence(content), correction_sentence(content)):
        if sentence:
            print(f"{sentence}.")
    for guard in guards:
        print(guard_line(guard))
    return not certificate.overlap and all(guard["certified"] for guard in guards)
