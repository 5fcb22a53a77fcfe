"""Options of every command. The docstring below each field is its help text."""

import dataclasses
from pathlib import Path

import tyro

from ev3_distill import config

DISTRIBUTED_SUITES = ("evolution", "protonet")  # the benchmarks that several processes can share


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """How several processes share the work."""

    processes: str = "1"
    """Number of processes that share the work, each started with this command.
    auto: taken from the cluster (SLURM, Kubernetes, Cloud TPU or MPI)."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 listens; all processes must reach it."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def start(self) -> bool:
        """Joins the processes, which must happen before JAX is asked for devices. Returns whether there are several."""
        from ev3_distill.runtime import distributed

        if (self.processes, self.coordinator, self.process_id) == ("1", None, None):
            return False
        return distributed.join_processes(self.processes, self.coordinator, self.process_id)[1] > 1


@dataclasses.dataclass(frozen=True)
class ExecutionOptions(DistributedOptions):
    """Where a run is stored and what it runs on."""

    config: Path | None = None
    """TOML file of options. Options on the command line override it."""
    out: Path | None = None
    """New run directory. Default: a directory under runs/, named by the command and the time."""
    resume: Path | None = None
    """Continue the run in this directory, exactly where it stopped."""
    tensorboard: Path | None = None
    """Directory for TensorBoard event files with the content of the ledger; needs ev3-distill[tensorboard]."""
    devices: int = 0
    """Number of devices to use. 0: one device, or all of them in a multi-process run."""
    spread: str = "batch"
    """What to distribute over devices: batch (a part of each batch per device) or arms (those of one iteration in parallel)."""
    compile_cache: bool = True
    """Store compiled programs for the next command on this machine. Several processes never do."""


@dataclasses.dataclass(frozen=True)
class CompressCommand:
    """Distill a teacher into a small student with a certificate."""

    run: tyro.conf.OmitArgPrefixes[config.Compress] = dataclasses.field(default_factory=config.Compress)
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions] = dataclasses.field(default_factory=ExecutionOptions)


@dataclasses.dataclass(frozen=True)
class TeachCommand:
    """Train a teacher on labels alone and save it."""

    run: tyro.conf.OmitArgPrefixes[config.Teach] = dataclasses.field(default_factory=config.Teach)
    execution: tyro.conf.OmitArgPrefixes[ExecutionOptions] = dataclasses.field(default_factory=ExecutionOptions)


@dataclasses.dataclass(frozen=True)
class EvaluateCommand:
    """Score the student of a finished run, or an exported file, with exact bounds."""

    run: tyro.conf.Positional[Path]
    """Run directory, exported file, or folder of an exported file."""
    data: str = ""
    """Data source, as --data of compress. Examples that the student has seen are left out. Default: the sealed test split of
    the run."""
    keep_overlap: bool = False
    """Score examples of --data that the student has seen, too. Nothing is certified then: exit code 3."""
    confidence: float | None = None
    """Confidence level, jointly for all bounds. Default: 0.95, or that of the run on its own sealed split."""
    student: str = ""
    """MODULE:FACTORY of a student of your own. Code is never imported just because a run names it."""
    guard: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Requirement on these examples, as --guard of compress. Exit code 3 if it is not proven."""
    costs: str = ""
    """CSV file of costs, as --costs of compress."""
    reopen: bool = False
    """Open the sealed split of the run again, for bounds that its certificate lacks. They are corrected for it."""
    of: Path | None = None
    """Run that an exported file comes from: compares its predictions with those of the student, example by example."""
    threads: int = 0
    """Threads for an exported file. 0: as many as there are processors."""
    trust_run: bool = False
    """Import code that only the run names, such as its python: teacher. Never for a run that you do not trust."""
    compile_cache: bool = True
    """Store compiled programs, as --compile-cache of compress."""


@dataclasses.dataclass(frozen=True)
class CopiesCommand:
    """Find examples that are identical or near-copies of each other, and write their clusters as groups."""

    data: str
    """Data source, as --data of compress."""
    out: Path
    """New npz file for --groups of compress, which with --split-by groups keeps each cluster in one split."""
    memory: str = config.Compress.memory
    """Maximum memory, as --memory of compress."""


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Print the report of a finished run and render its page again, or follow a run."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    live: bool = False
    """Follow a run of another process until it finishes or the process ends."""


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """Export the student of a finished run, or another student that its search tried."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path
    """New folder for the student, with evidence.json and MODEL_CARD.md."""
    format: str = "flax"
    """flax: parameters as safetensors, plus a StableHLO function that applies them; also a teacher, flax:DIR.
    onnx or stablehlo: a file for other runtimes."""
    pick: str = ""
    """Conditions on params, accuracy or bound, such as 'params<=20000'.
    Exports the student with the highest bound on decide that meets them."""
    layout: str = "nhwc"
    """Position of the channel axis in the inputs of the file: nhwc (last, as in the data) or nchw (first)."""
    softmax: bool = False
    """Output probabilities instead of logits."""
    int8: bool = False
    """Quantize weights and activations of an ONNX file to int8, calibrated on examples of the explore split."""
    teacher_licence: str = "unknown"
    """License of the teacher, recorded in the file and its model card."""
    student: str = ""
    """MODULE:FACTORY of a student of your own, as --student of evaluate."""
    latency: bool = False
    """Measure the latency of the file, and of the teacher if it can run, on this machine, for the model card."""
    trust_run: bool = False
    """Import code that only the run names, as --trust-run of evaluate."""
    compile_cache: bool = True
    """Store compiled programs, as --compile-cache of compress."""


@dataclasses.dataclass(frozen=True)
class BenchCommand(DistributedOptions):
    """Measure the tool itself: raw rows, a table and a page with plots; or compare two such results."""

    suite: tyro.conf.Positional[str] = ""
    """coverage, evolution, growth, guards, hypergrad, int8, memory, noise, portfolio, protonet, pytorch, quality, rescue,
    robustness, rotation, safety, scaling, search, speed, sweeps, throughput or tuning."""
    seeds: int = 10
    """Number of seeds."""
    size: str = "full"
    """full; or smoke: a quick run that checks the code and proves nothing."""
    only: tuple[str, ...] = ()
    """Parts to measure, by name, of a suite that has parts: robustness or scaling."""
    keep_rows: bool = False
    """Keep rows in --out that other code measured, mark them, and say so below the table."""
    out: Path | None = None
    """Directory for rows, table and page. Default: print only. With --compare: an HTML file."""
    compare: tuple[Path, Path] | None = None
    """Measure nothing; report what changed beyond noise from one such directory to another."""
    render: tuple[Path, ...] = ()
    """Measure nothing; render the tables, plots and pages of such directories again."""
