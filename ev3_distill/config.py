"""Every default of a run, in one place. Imports no numerical library, so that the command line starts quickly.

The docstring below each field is its help text on the command line.
"""

import dataclasses
from typing import Annotated, Any

import tyro

from ev3_distill import guards
from ev3_distill.errors import check

INT8, FLOAT32 = "int8", "float32"
EXAMPLES, GROUPS = "examples", "groups"  # what splits are dealt by
GUARD_HELP = guards.help_text()


@dataclasses.dataclass(frozen=True)
class EV3:
    """How the EV3 core explores, assesses and adapts."""

    batch_size: int = 128
    """Examples per training step."""
    length: int = 50
    """Shortest trajectory in steps, outside of a race."""
    max_length: int = 2000
    """Longest trajectory in steps. A trajectory takes a fiftieth of the budget, within these limits."""
    race: float = 0.08
    """Fraction of the budget that each arm may use in the race at the start, for at most half of the budget in total.
    If that is fewer than two trajectories of `length` steps, only the first two arms that start fast race, and the first of
    them leads unless the other is clearly ahead. 0: no race, the first arm leads."""
    drop: float = 5.0
    """Standard errors on the assess split by which an arm must lie behind the best arm to leave the race early, and by which
    the second arm must be ahead of the first to lead after a short race."""
    final: float = 0.2
    """Fraction of the budget, at its end, that trains on the assess and decide splits, too: nothing is decided any more.
    0: none. Runs with guards, a control or a patience, searches, and runs that deliver the champion decide to the end."""
    delta: float = 0.05
    """Error budget: bound on the probability that any promotion of the whole run is to a truly worse student."""
    roll_back: float = 0.01
    """Level of the paired test on assess that rolls the current student back to the champion."""
    patience: float = 0.0
    """Trajectories without progress, on assess or on explore, after which the student counts as stuck at its size.
    A stuck student grows, or the run ends. 0: never stuck, the whole budget is spent. A search for a size uses 6."""
    eval_batch_size: int = 1024
    """Examples per forward pass on assess and decide. Limits memory; does not change results."""

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size, "try 128")
        check(self.eval_batch_size >= 1, "eval_batch_size must be at least 1", self.eval_batch_size, "try 1024")
        check(1 <= self.length <= self.max_length, "1 <= length <= max_length must hold",
              (self.length, self.max_length), "raise max_length or lower length")  # fmt: skip
        check(0 <= self.race <= 0.5, "race must be a fraction from 0 to 0.5", self.race, "try 0.08")
        check(self.drop > 0, "drop must be positive", self.drop, "try 5")
        check(0 <= self.final < 1, "final must be a fraction from 0, below 1", self.final, "try 0.2")
        check(0 < self.delta < 1, "delta must be a probability above 0 and below 1", self.delta, "try 0.05")
        check(self.patience >= 0, "patience must not be negative", self.patience, "try 2")
        check(0 < self.roll_back < 0.5, "roll_back must be a level above 0 and below 0.5", self.roll_back, "try 0.01")


@dataclasses.dataclass(frozen=True)
class Fractions:
    """Fractions of the data for the four splits. If the source has its own test examples, they are the test split."""

    explore: float = 0.5
    """Trains the student."""
    assess: float = 0.15
    """Selects among proposals."""
    decide: float = 0.15
    """Tests promotions."""
    test: float = 0.2
    """Sealed: opened once, for the certificate."""
    most: int = 2500
    """Maximum number of examples in assess and in decide; the rest goes to explore."""

    def __post_init__(self) -> None:
        fractions = (self.explore, self.assess, self.decide, self.test)
        check(self.most >= 1, "most must be at least 1", self.most, "try 2500")
        check(
            min(fractions) > 0, "the fraction of every split must be positive", fractions, "raise the one that is not"
        )
        check(
            abs(sum(fractions) - 1) < 1e-6, "the fractions of the splits must sum to 1", sum(fractions), "rescale them"
        )


@dataclasses.dataclass(frozen=True)
class Budget:
    """The cost that a run may reach, parsed."""

    steps: int | None = None  # summed over all arms
    epochs: float | None = None  # of the explore split
    seconds: float | None = None  # wall time

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Parses `2000` (steps), `10e` (epochs of the explore split), `90s`, `2m` or `1h` (wall time)."""
        number, unit = (text[:-1], text[-1:]) if text[-1:] in "esmh" else (text, "")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        whole = unit != "" or value.is_integer()
        check(0 < value < 2**30 and whole, "a budget must be a positive number of steps (2000), epochs (10e) or a wall "
              "time (90s, 2m, 1h)", f"'{text}'", "try 2000")  # fmt: skip
        if unit == "e":
            return cls(epochs=value)
        return cls(seconds=value * {"s": 1, "m": 60, "h": 3600}[unit]) if unit else cls(steps=int(value))

    def in_steps(self, examples: int, batch_size: int) -> int | None:
        """The budget in training steps; None if it is a wall time.

        Args:
          examples: in the explore split; an epoch is as many steps as it takes to cover them.
          batch_size: examples per step.
        """
        if self.epochs is not None:
            return max(1, round(self.epochs * examples / batch_size))
        return self.steps


def _option(name: str) -> Any:
    """Prefixes the name of an option about the teacher's inputs."""
    return tyro.conf.arg(name=f"teacher-input.{name}")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an example becomes a teacher input: pixels in [0, 1] -> channels -> order -> resize -> scale -> mean, std -> layout.

    An empty value or 0 skips the step, or leaves it to the `teacher.toml` next to the teacher's file if there is one. To
    undo a step of that file, give the step that does nothing (scale 1, mean 0, std 1).
    """

    layout: Annotated[str, _option("layout")] = ""
    """Axis order of the teacher's input: NHWC or NCHW, or NWHC or NCWH with height and width exchanged.
    Default: derived from the teacher's input shape, where that is unambiguous."""
    channels: Annotated[int, _option("channels")] = 0
    """1: convert to gray. 3: repeat gray to RGB."""
    order: Annotated[str, _option("order")] = ""
    """Order of the color channels: RGB, as in the data, or BGR. Mean and std are in this order."""
    resize: Annotated[tuple[int, ...], _option("resize")] = ()
    """Height and width in pixels; bilinear."""
    scale: Annotated[float, _option("scale")] = 0.0
    """Factor for pixels in [0, 1]: 255 for a teacher that takes bytes. -1 with a mean of -1 inverts black and white."""
    mean: Annotated[tuple[float, ...], _option("mean")] = ()
    """Subtracted after scaling: one number, or one per channel."""
    std: Annotated[tuple[float, ...], _option("std")] = ()
    """Divisor, applied after the mean: one number, or one per channel."""
    classes: Annotated[tuple[str, ...], _option("classes")] = ()
    """Class names in the order of the teacher's outputs, where it differs from that of the data."""
    outputs: Annotated[str, _option("outputs")] = ""
    """What the teacher returns: logits; probabilities (the logarithm is taken); or sigmoid (it is undone).
    A teacher of two classes with one output column needs logits or probabilities: it is that of class 1."""

    def __post_init__(self) -> None:
        layouts = ("NHWC", "NCHW", "NWHC", "NCWH")
        check(self.layout in ("", *layouts), f"layout must be {' or '.join(layouts)}", f"'{self.layout}'", "name one")
        check(self.channels in (0, 1, 3), "channels must be 1 or 3", self.channels, "omit it to keep the data's")
        check(self.order in ("", "RGB", "BGR"), "order must be RGB or BGR", f"'{self.order}'", "name one")
        check(len(self.resize) in (0, 2) and min(self.resize, default=1) > 0,
              "resize must be a height and a width above 0", self.resize, "try 224 224")  # fmt: skip
        numbers = (self.scale, *self.mean, *self.std)
        check(all(abs(x) < float("inf") for x in numbers), "scale, mean and std must be finite", numbers, "fix them")
        check(min(self.std, default=1.0) > 0, "std must be positive", self.std, "omit it for 1")
        lengths = {len(self.mean), len(self.std)} - {0, 1}
        check(len(lengths) < 2, "mean and std need one number, or one per channel", (self.mean, self.std), "fix one")
        check(len(set(self.classes)) == len(self.classes), "class names must be distinct", self.classes, "fix them")
        check(self.outputs in ("", "logits", "probabilities", "sigmoid"),
              "outputs must be logits, probabilities or sigmoid", f"'{self.outputs}'", "name one")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every run has, that of a student and that of a teacher."""

    data: str = "digits"
    """Data source: digits (built in), npz:FILE, folder:DIR or folder:FILE.zip of images, or tfds:NAME."""
    budget: str = ""
    """Maximum cost."""
    seed: int = 0
    """Seed of the splits, the initial parameters and all other random choices.
    A teacher and its student must share it, so that the test split is new to both."""
    confidence: float = 0.95
    """Confidence level of the certificate, jointly for all its bounds."""
    augment: str = "auto"
    """Augmentation of images: none; or a list such as flip,crop=4,translate=2,cutout=8,mixup or cutmix;
    or auto: flip and crop color images."""
    standardize: bool = True
    """Standardize inputs by statistics of the explore split, which become a part of the student: vectors by column, sequences
    by channel; images only where pixels exceed 8 (bytes as int64 or float32, 12 or 16 bits), by their range."""
    memory: str = ""
    """Memory limit such as 1G; data that do not fit stay on disk. Default: half of the machine's memory."""
    skip_corrupt: bool = False
    """Skip images that cannot be read, with a warning, instead of refusing the data."""
    stored_pixels: tyro.conf.Suppress[bool] = False
    """Ignore transparency and EXIF orientation of images unless the data source decides, as runs of older versions do."""
    checkpoint_s: float = 5.0
    """Seconds between checkpoints. 0: one after every iteration."""
    splits: Fractions = Fractions()
    """Fractions of the data for the four splits."""
    split_by: str = EXAMPLES
    """What is divided among the splits: examples, or groups: all examples of a group (patient, video, author) go to one split.
    The data then need a column `groups`, and all proofs count groups."""
    groups: str = ""
    """File with the group of each example, if the data have no column `groups`: .npz with an array `groups`,
    or .csv with the name of each image and its group."""
    joint_strata: tyro.conf.Suppress[bool] = False
    """Stratify all four splits jointly by class, as runs of older versions do: their certificates may promise too much."""
    ev3: EV3 = EV3()
    """Hyperparameters of the EV3 core."""

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**31, "seed must be 0 to 2^31 - 1", self.seed, "try 0")
        check(0.5 <= self.confidence < 1, "confidence must be at least 0.5 and below 1", self.confidence, "try 0.95")
        check(self.split_by in (EXAMPLES, GROUPS), "split_by must be examples or groups", f"'{self.split_by}'",
              "try groups")  # fmt: skip
        check(self.checkpoint_s >= 0, "checkpoint_s must not be negative", self.checkpoint_s, "try 5")
        Budget.parse(self.budget)
        parse_bytes(self.memory)


@dataclasses.dataclass(frozen=True)
class Compress(RunConfig):
    """Distill a teacher into a small student with a certificate."""

    budget: str = "20000"
    """Maximum cost: training steps summed over all arms (2000), epochs of the explore split (10e), or wall time (2m)."""
    teacher: str = ""
    """Teacher: onnx:FILE, torch:FILE.pt2, flax:DIR (a run of teach or compress), python:MODULE:FUNCTION,
    sklearn:FILE.skops, logits:FILE.npz, or ensemble:A,B,...
    Default: train one first, see --teacher-network."""
    student: str = "auto"
    """Network to train, as FAMILY:OPTION=N,...: mlp:hidden=W-W-..., resnet:depth=8,width=16 (or resnet8),
    mobilenet, vit, conv4, convnet1d or transformer; or MODULE:FACTORY for your own;
    or auto: a network that suits the shape of the examples."""
    start: str = ""
    """Search for the smallest student that meets the guards.
    Starts with this network (as --student, or tiny: the smallest of the family of --student).
    Grows it while it is stuck below the guards, then tries smaller ones again."""
    sizes: tuple[str, ...] = ()
    """Search among these networks instead, smallest first, each as --student."""
    max_params: int = 0
    """Maximum number of parameters in a search. 0: no limit."""
    moves: tuple[str, ...] = ()
    """Growth moves that a search may use, such as wider, deeper or heads. Default: all moves of the family."""
    passes: int = 1
    """Number of search passes.
    From the second on, all sizes train again and the best student so far is a second teacher."""
    arms: tuple[str, ...] = ()
    """Arms that compete, by name. Default: a portfolio that suits the student and the guards."""
    tune: tuple[str, ...] = ()
    """Add an arm that tunes its loss by hypergradients of the assess loss, any of:
    temperature, mix (of teacher and labels), weights (of examples), rate (learning rate), noise (on training inputs)."""
    views: int = 4
    """Augmented views per example for which teacher outputs are computed. Later epochs reuse them in turn."""
    precision: str = FLOAT32
    """Precision of cached teacher logits: float32, float16, or top8 (the 8 largest, and the total mass of the rest)."""
    teacher_as_is: bool = False
    """Use the teacher even if other preprocessing or another class order would clearly improve it."""
    teacher_in_step: bool = False
    """Run a flax teacher inside the training step, on new views in every epoch, instead of caching its outputs."""
    guards: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="guard", help=GUARD_HELP)] = ()
    """Requirements on the student, such as 'accuracy >= 0.9'; `GUARD_HELP` lists every metric."""
    costs: str = ""
    """CSV file for a guard on cost: the cost of predicting a class (column) for an example of a class (row)."""
    deploy: str = FLOAT32
    """Arithmetic in which the student is scored and certified: float32 or int8.
    int8 is simulated on the quantization grid of the ONNX file that export writes.
    Training rounds weights in the last quarter of the budget; arms named ...-straight round them from the start."""
    control: bool = False
    """Also train the same student on labels alone, which doubles the cost.
    The report then shows how much distillation helps. If decide prefers that student, it is the one delivered."""
    stop_when_met: bool = False
    """Stop as soon as the decide split proves every guard that training can affect."""
    deliver: str = "best"
    """best: the current student if it scores above the champion on decide, else the champion. With guards: the current student,
    unless decide shows the champion, or the student that was safest on assess, to be clearly better by the guards.
    champion: always the champion, the last student that passed a promotion test."""
    teacher_network: str = "mlp:hidden=256-256"
    """Network (as --student) of the teacher that is trained when --teacher is omitted."""
    teacher_budget: str = "2000"
    """Budget (as --budget) of that teacher."""
    teacher_input: Preprocessing = Preprocessing()
    """How an example becomes a teacher input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget.parse(self.teacher_budget)
        for guard in self.guards:
            guards.parse(guard)
        check(self.views >= 1, "views must be at least 1", self.views, "try 4")
        check(self.deploy in (FLOAT32, INT8), "deploy must be float32 or int8", f"'{self.deploy}'", "try int8")
        check(self.deliver in ("best", "champion"), "deliver must be best or champion", f"'{self.deliver}'", "try best")
        check(bool(self.guards) or not self.stop_when_met, "stop_when_met needs a guard", "none",
              "give --guard 'accuracy >= 0.9'")  # fmt: skip
        check(self.deploy == FLOAT32 or not self.control, "a control is scored in float32",
              f"--control with --deploy {self.deploy}", "omit one")  # fmt: skip
        self._check_search()

    @property
    def searches(self) -> bool:
        """Whether the run searches for the smallest student that meets its guards."""
        return bool(self.start or self.sizes)

    def teacher_config(self) -> "Teach":
        """The configuration of the teacher that is trained when none is named, on the same splits.

        It has no final phase: a teacher that has learned from assess and decide would favor the students that follow it there.
        """
        return self._teach(self.teacher_network, self.teacher_budget, EV3(final=0.0))

    def control_config(self) -> "Teach":
        """The configuration of the control: the same student, trained on labels alone; decide compares both."""
        return self._teach(self.student, self.budget, dataclasses.replace(self.ev3, final=0.0))

    def _teach(self, network: str, budget: str, ev3: EV3) -> "Teach":
        return Teach(
            data=self.data,
            network=network,
            budget=budget,
            seed=self.seed,
            augment=self.augment,
            standardize=self.standardize,
            memory=self.memory,
            skip_corrupt=self.skip_corrupt,
            stored_pixels=self.stored_pixels,
            checkpoint_s=self.checkpoint_s,
            splits=self.splits,
            split_by=self.split_by,
            groups=self.groups,
            joint_strata=self.joint_strata,
            ev3=ev3,
        )

    def _check_search(self) -> None:
        """Checks the options of a search, and those that a search cannot have."""
        check(not (self.start and self.sizes), "a search takes --start or --sizes", "both", "omit one")
        check(self.max_params >= 0, "max_params must not be negative", self.max_params, "omit it for no limit")
        check(self.passes >= 1, "passes must be at least 1", self.passes, "try 1")
        if not self.searches:
            check(self.max_params == 0 and self.passes == 1, "max_params and passes are options of a search",
                  (self.max_params, self.passes), "give --start tiny")  # fmt: skip
            return
        check(not self.control, "a search has no control", "--control", "omit it, or --start")
        check(not self.teacher_in_step, "a search uses cached teacher outputs", "--teacher-in-step", "omit it")
        check(self.deliver != "champion", "a search delivers the smallest student that meets the guards",
              "--deliver champion", "omit it")  # fmt: skip
        check(Budget.parse(self.budget).seconds is None, "a search needs a budget in steps or epochs",
              f"'{self.budget}'", "try 20000")  # fmt: skip
        check(self.deploy == FLOAT32, "a search scores its students in float32", f"--deploy {self.deploy}",
              "search first, then train the selected network with --deploy int8")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Teach(RunConfig):
    """Train a teacher on labels alone and save it."""

    budget: str = "2000"
    """Maximum cost: training steps (2000), epochs of the explore split (10e), or wall time (2m)."""
    network: str = "mlp:hidden=256-256"
    """Network to train, as --student of compress."""
    ev3: EV3 = EV3(final=0.0)
    """Hyperparameters of the EV3 core. By default without a final phase: students that learn from this teacher are compared on
    assess and decide."""


def parse_bytes(text: str) -> int:
    """Parses a size such as `500M`, `1G` or `1.5G` (powers of 1024); 0 for an empty text."""
    if not text:
        return 0
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    try:
        size = float(text[:-1]) * units[text[-1:].upper()]
    except (ValueError, KeyError):
        size = 0.0
    check(2**20 <= size < 2**60, "a memory limit must be a number with a unit K, M, G or T, and at least 1M",
          f"'{text}'", "try 1G")  # fmt: skip
    return int(size)
