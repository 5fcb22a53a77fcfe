"""Every default of a run, visible in one place. No numbers are crunched here, so that the command line starts at once."""

import dataclasses
from typing import Annotated, Any

import tyro

from ev3_distill import guards
from ev3_distill.errors import InputError


def _check(ok: bool, rule: str, got: object, way_out: str) -> None:
    if not ok:
        raise InputError(f"{rule}; got {got}: {way_out}")


@dataclasses.dataclass(frozen=True)
class EV3:
    """How the EV3 core explores, assesses and adapts."""

    batch_size: int = 128
    """Examples in one training step."""
    length: int = 50
    """Steps of the first trajectories; later ones follow their evidence."""
    max_length: int = 2000
    """Longest trajectory, in steps."""
    max_share: float = 0.2
    """Longest trajectory, as a share of the steps that the student has had; after one in vain, 4 x length if that is more."""
    exploration: float = 0.2
    """Probability that an iteration gives a challenger the same steps as the leading arm; falls in a line to 0 at the end of
    the budget, where a better arm would pay off no more."""
    takeover: float = 1.0
    """Standard errors on assess by which a challenger must beat the leader's proposal to take its place."""
    delta: float = 0.05
    """Error budget: probability, over the whole run, that any promotion is to a truly worse student."""
    roll_back: float = 0.01
    """Level of the paired test on assess that sends a student, worse than the champion, back to it."""
    patience: float = 0.0
    """Trajectories without progress, neither on assess nor on what explore holds, after which the student is stuck at its
    size: it may grow then, or the run ends. 0: never stuck, the whole budget is spent. A search for a size takes 6."""
    eval_batch_size: int = 1024
    """Examples of one forward pass in assess and decide; bounds memory, changes no result."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "batch_size must be at least 1", self.batch_size, "try 128")
        _check(self.eval_batch_size >= 1, "eval_batch_size must be at least 1", self.eval_batch_size, "try 1024")
        _check(1 <= self.length <= self.max_length, "1 <= length <= max_length must hold",
               (self.length, self.max_length), "raise max_length or lower length")  # fmt: skip
        _check(0 < self.max_share <= 1, "max_share must be above 0 and at most 1", self.max_share, "try 0.2")
        _check(0 <= self.exploration <= 1, "exploration is a probability", self.exploration, "give 0 to 1")
        _check(self.takeover >= 0, "takeover must not be negative", self.takeover, "try 1.0")
        _check(0 < self.delta < 1, "delta is a probability above 0 and below 1", self.delta, "try 0.05")
        _check(self.patience >= 0, "patience must not be negative", self.patience, "try 2")
        _check(0 < self.roll_back < 0.5, "roll_back is a level above 0 and below 0.5", self.roll_back, "try 0.01")


@dataclasses.dataclass(frozen=True)
class Fractions:
    """Shares of the data that the four splits get. A source's own test rows are its test split whatever `test` says."""

    explore: float = 0.5
    """Meets gradients."""
    assess: float = 0.15
    """Selects among proposals."""
    decide: float = 0.15
    """Proves promotions."""
    test: float = 0.2
    """Sealed; opened once, for the certificate."""
    most: int = 2500
    """Examples that assess and decide each get at most; the rest goes to explore."""

    def __post_init__(self) -> None:
        shares = (self.explore, self.assess, self.decide, self.test)
        _check(self.most >= 1, "most must be at least 1", self.most, "try 2500")
        _check(min(shares) > 0, "every split's fraction must be positive", shares, "raise the one that is not")
        _check(abs(sum(shares) - 1) < 1e-6, "the splits' fractions must sum to 1", sum(shares), "rescale them")


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much a run may cost, parsed."""

    steps: int | None = None  # summed over all arms
    epochs: float | None = None  # of the explore split
    seconds: float | None = None  # wall time

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Reads `2000` (steps), `10e` (epochs of the explore split), `90s`, `2m` or `1h` (wall time)."""
        number, unit = (text[:-1], text[-1:]) if text[-1:] in "esmh" else (text, "")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        whole = unit != "" or value.is_integer()
        _check(0 < value < 2**30 and whole, "a budget is a positive number of steps (2000), epochs (10e) or a wall time "
               "(90s, 2m, 1h)", f"'{text}'", "try 2000")  # fmt: skip
        if unit == "e":
            return cls(epochs=value)
        return cls(seconds=value * {"s": 1, "m": 60, "h": 3600}[unit]) if unit else cls(steps=int(value))

    def in_steps(self, examples: int, batch_size: int) -> int | None:
        """Training steps, where the budget is not a wall time; an epoch is as many steps as cover the explore split."""
        if self.epochs is not None:
            return max(1, round(self.epochs * examples / batch_size))
        return self.steps


def _option(name: str) -> Any:
    """On the command line, what concerns the teacher's inputs says so."""
    return tyro.conf.arg(name=f"teacher-input.{name}")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a teacher's inputs are made of: pixels in [0, 1] -> channels -> order -> resize -> scale -> mean, std -> layout.

    Empty or 0 leaves a step out, and leaves it to the `teacher.toml` beside the teacher's file where there is one; to undo
    what that file says, give the step that does nothing (scale 1, mean 0, std 1).
    """

    layout: Annotated[str, _option("layout")] = ""
    """Of the teacher's input: NHWC or NCHW, or NWHC and NCWH with height and width exchanged; where it is not given, the
    teacher's own input shape decides if it can."""
    channels: Annotated[int, _option("channels")] = 0
    """1: to grey; 3: grey repeated to RGB."""
    order: Annotated[str, _option("order")] = ""
    """Of the teacher's colour channels: RGB, as the data's, or BGR. Mean and std are in the teacher's order."""
    resize: Annotated[tuple[int, ...], _option("resize")] = ()
    """Height and width, bilinear."""
    scale: Annotated[float, _option("scale")] = 0.0
    """Multiplies pixels in [0, 1]: 255 for a teacher that takes bytes. With mean, -1 and -1 exchange black and white."""
    mean: Annotated[tuple[float, ...], _option("mean")] = ()
    """Subtracted after scaling, one number or one per channel."""
    std: Annotated[tuple[float, ...], _option("std")] = ()
    """Divided by, after the mean."""
    classes: Annotated[tuple[str, ...], _option("classes")] = ()
    """Names of the teacher's outputs in their order, where it is not the data's."""

    def __post_init__(self) -> None:
        layouts = ("NHWC", "NCHW", "NWHC", "NCWH")
        _check(self.layout in ("", *layouts), f"a layout is {' or '.join(layouts)}", f"'{self.layout}'", "name one")
        _check(self.channels in (0, 1, 3), "channels is 1 or 3", self.channels, "leave it out to keep the data's")
        _check(self.order in ("", "RGB", "BGR"), "an order of channels is RGB or BGR", f"'{self.order}'", "name one")
        _check(len(self.resize) in (0, 2) and min(self.resize, default=1) > 0, "resize is a height and a width above 0",
               self.resize, "try 224 224")  # fmt: skip
        numbers = (self.scale, *self.mean, *self.std)
        _check(all(abs(x) < float("inf") for x in numbers), "scale, mean and std are finite", numbers, "mend them")
        _check(min(self.std, default=1.0) > 0, "std must be positive", self.std, "leave it out for 1")
        lengths = {len(self.mean), len(self.std)} - {0, 1}
        _check(len(lengths) < 2, "mean and std need one number, or one per channel", (self.mean, self.std), "mend one")
        _check(len(set(self.classes)) == len(self.classes), "class names must be distinct", self.classes, "mend them")


@dataclasses.dataclass(frozen=True)
class Compress:
    """Distil a teacher into a small student, with a certificate."""

    data: str = "digits"
    """Source of examples: digits (embedded), npz:FILE, folder:DIR or folder:FILE.zip of images, or tfds:NAME."""
    teacher: str = ""
    """Source of the teacher's knowledge: onnx:FILE, torch:FILE.pt2, flax:DIR (a run of teach or compress),
    python:MODULE:FUNCTION, sklearn:FILE.skops, logits:FILE.npz, or ensemble:A,B,... None: one is trained first, by the
    recipe below."""
    student: str = "auto"
    """Network to train, FAMILY:OPTION=N,...: mlp:hidden=W-W-..., resnet:depth=8,width=16 (or resnet8), mobilenet, vit,
    conv4, convnet1d, transformer; auto chooses by the examples' shape; or MODULE:FACTORY of your own."""
    start: str = ""
    """Search for the smallest student that meets the guards: begin with this network, as --student, or `tiny`: the smallest
    of that family; grow it where it is stuck, and come back down where that works too."""
    sizes: tuple[str, ...] = ()
    """The same with sizes of your own, smallest first, each as --student."""
    max_params: int = 0
    """Parameters that such a search may go up to; 0: as far as guards and budget allow."""
    moves: tuple[str, ...] = ()
    """Ways to grow that it may take, such as wider, deeper or heads; all that the family has if none is named."""
    passes: int = 1
    """Of such a search. In further ones the best student so far teaches beside the teacher, and every size starts again."""
    budget: str = "20000"
    """Cost allowed: training steps summed over all arms (2000), epochs of the explore split (10e), or wall time (2m)."""
    arms: tuple[str, ...] = ()
    """Arms to use, by name; the default portfolio if none is named."""
    tune: tuple[str, ...] = ()
    """Adds an arm whose loss follows that on assess while it trains, by hypergradients: temperature, mix (of teacher and
    labels), weights (of examples), rate, or noise (on the inputs in training), any of them."""
    seed: int = 0
    """Of the splits, the initial parameters, the batches and all keys."""
    confidence: float = 0.95
    """Of the certificate, for all its claims at once."""
    augment: str = "auto"
    """What training may do to images: none, words of flip,crop=4,translate=2,cutout=8,mixup,cutmix, or auto, which flips
    and crops colour images."""
    views: int = 4
    """Augmented views of each example that the teacher is asked of; after these the first comes again."""
    memory: str = ""
    """Limit such as 1G; data that do not fit stay on disk. By default half of this machine's."""
    precision: str = "float32"
    """Of cached logits: float32, float16, or top8 (the greatest 8, and the mass of the others)."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and say so, instead of refusing the data."""
    teacher_as_is: bool = False
    """Go on with a teacher that other preprocessing or another class order would clearly improve."""
    teacher_in_step: bool = False
    """Run a flax teacher inside the training step, on fresh views for ever, instead of caching what it says."""
    guards: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="guard")] = ()
    """What must hold, such as 'accuracy >= 0.9', once for each: exit code 3 where the certificate does not prove it.
    At least (>=): accuracy, topK_accuracy, balanced_accuracy, worst_class_accuracy, worst_group_accuracy, macro_f1, agreement
    with the teacher, MODULE:FUNCTION of your own. At most (<=): drop(accuracy) or drop(topK_accuracy) against the teacher,
    ece, brier, cost, params, bytes, latency_ms."""
    costs: str = ""
    """CSV file for a guard on cost: what it costs to say a class (column) of an example of a class (row)."""
    deploy: str = "float32"
    """What the student is scored as, all along, and certified: float32, or int8, simulated, on the same grid as the ONNX file
    that export then writes. It trains with rounded weights in the last quarter of the budget, by arms with -straight behind
    their names all along."""
    control: bool = False
    """Train the same student by labels alone too, at the same cost again: the report then tells by how much distillation
    helped, and where decide prefers that student, it is the one delivered."""
    stop_when_met: bool = False
    """End the run early, as soon as the decide split proves every guard that training can change."""
    deliver: str = "best"
    """best: the current student where decide scores it above the champion, else the champion. champion: the proven one."""
    checkpoint_s: float = 5.0
    """Seconds between checkpoints; 0 writes one after every iteration."""
    teacher_network: str = "mlp:hidden=256-256"
    """Recipe of the teacher that is trained where none is named: its network (as --student) ..."""
    teacher_budget: str = "2000"
    """... and its budget."""
    teacher_input: Preprocessing = Preprocessing()
    """What the teacher's inputs are made of."""
    splits: Fractions = Fractions()
    """Shares of the four splits."""
    ev3: EV3 = EV3()
    """The core."""

    def __post_init__(self) -> None:
        _check_run(self.seed, self.confidence, self.checkpoint_s)
        Budget.parse(self.budget)
        Budget.parse(self.teacher_budget)
        bytes_of(self.memory)
        for guard in self.guards:
            guards.parse(guard)
        _check(not (self.start and self.sizes), "a search has a start or sizes", "both", "leave out one")
        searches = bool(self.start or self.sizes)
        _check(self.max_params >= 0, "max_params must not be negative", self.max_params, "leave it out for no limit")
        _check(self.passes >= 1, "passes must be at least 1", self.passes, "try 1")
        _check(searches or (self.max_params == 0 and self.passes == 1), "max_params and passes are of a search for a size",
               (self.max_params, self.passes), "give --start tiny")  # fmt: skip
        _check(not (searches and self.control), "a search for a size has no control", "--control",
               "leave it out, or --start")  # fmt: skip
        _check(not (searches and self.teacher_in_step), "a search for a size caches what its teacher says",
               "--teacher-in-step", "leave it out")  # fmt: skip
        _check(not (searches and self.deliver == "champion"), "a search delivers the student that decide proved",
               "--deliver champion", "leave it out")  # fmt: skip
        _check(not searches or Budget.parse(self.budget).seconds is None,
               "a search for a size has a budget in steps or epochs", f"'{self.budget}'", "try 20000")  # fmt: skip
        _check(self.deploy in ("float32", "int8"), "deploy is float32 or int8", f"'{self.deploy}'", "try int8")
        _check(self.deploy == "float32" or not searches, "a student that is scored in int8 has one size",
               f"--deploy {self.deploy} with a search", "search first, then train what it found in int8")  # fmt: skip
        _check(self.deploy == "float32" or not self.control, "a control is scored as it trains, in float32",
               f"--control with --deploy {self.deploy}", "leave out one")  # fmt: skip
        _check(self.views >= 1, "views must be at least 1", self.views, "try 4")
        _check(bool(self.guards) or not self.stop_when_met, "stop_when_met needs a guard", "none",
               "give --guard 'accuracy >= 0.9'")  # fmt: skip
        _check(self.deliver in ("best", "champion"), "deliver is best or champion", f"'{self.deliver}'", "try best")


@dataclasses.dataclass(frozen=True)
class Teach:
    """Train a teacher from a recipe: the same run with labels alone."""

    data: str = "digits"
    """Source of examples: digits (embedded), npz:FILE, folder:DIR or folder:FILE.zip of images, or tfds:NAME."""
    network: str = "mlp:hidden=256-256"
    """Network to train, as --student of compress."""
    budget: str = "2000"
    """Cost allowed: training steps (2000), epochs of the explore split (10e), or wall time (2m)."""
    seed: int = 0
    """Of the splits, the initial parameters, the batches and all keys. Use the same for compress: its test split must be
    new to the teacher too."""
    confidence: float = 0.95
    """Of the certificate."""
    augment: str = "auto"
    """What training may do to images, as of compress."""
    memory: str = ""
    """Limit such as 1G; data that do not fit stay on disk. By default half of this machine's."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and say so, instead of refusing the data."""
    checkpoint_s: float = 5.0
    """Seconds between checkpoints; 0 writes one after every iteration."""
    splits: Fractions = Fractions()
    """Shares of the four splits."""
    ev3: EV3 = EV3()
    """The core."""

    def __post_init__(self) -> None:
        _check_run(self.seed, self.confidence, self.checkpoint_s)
        Budget.parse(self.budget)
        bytes_of(self.memory)


def bytes_of(text: str) -> int:
    """Reads a size such as `500M`, `1G` or `1.5G` (powers of 1024); 0 for none."""
    if not text:
        return 0
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    try:
        size = float(text[:-1]) * units[text[-1:].upper()]
    except (ValueError, KeyError):
        size = 0.0
    _check(2**20 <= size < 2**60, "a memory limit is a number with a unit, K, M, G or T, of 1M or more", f"'{text}'",
           "try 1G")  # fmt: skip
    return int(size)


def _check_run(seed: int, confidence: float, checkpoint_s: float) -> None:
    _check(0 <= seed < 2**31, "seed must be 0 to 2^31 - 1", seed, "try 0")
    _check(0.5 <= confidence < 1, "confidence must be at least 0.5 and below 1", confidence, "try 0.95")
    _check(checkpoint_s >= 0, "checkpoint_s must not be negative", checkpoint_s, "try 5")
