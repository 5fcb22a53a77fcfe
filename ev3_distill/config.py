"""Every default of a run, visible in one place. Pure Python, so that the command line starts at once."""

import dataclasses

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
    """Longest trajectory, as a share of the steps so far."""
    exploration: float = 0.2
    """Probability that an iteration gives a challenger the same steps as the leading arm."""
    takeover: float = 1.0
    """Standard errors on assess by which a challenger must beat the leader's proposal to take its place."""
    delta: float = 0.05
    """Error budget: probability, over the whole run, that any promotion is to a truly worse student."""
    roll_back: float = 0.01
    """Level of the paired test on assess that sends a student, worse than the champion, back to it."""
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

    def __post_init__(self) -> None:
        shares = dataclasses.astuple(self)
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


@dataclasses.dataclass(frozen=True)
class Compress:
    """Distil a teacher into a small student, with a certificate."""

    data: str = "digits"
    """Source of examples: digits (embedded), or npz:FILE."""
    teacher: str = ""
    """Source of the teacher's knowledge: logits:FILE.npz, or flax:DIR (a run of teach or compress). None: one is trained
    first, by the recipe below."""
    student: str = "mlp:hidden=32"
    """Network to train: mlp:hidden=W-W-..., or MODULE:FACTORY of your own."""
    budget: str = "20000"
    """Cost allowed: training steps summed over all arms (2000), epochs of the explore split (10e), or wall time (2m)."""
    arms: tuple[str, ...] = ()
    """Arms to use, by name; the default portfolio if none is named."""
    seed: int = 0
    """Of the splits, the initial parameters, the batches and all keys."""
    confidence: float = 0.95
    """Of the certificate, for all its claims at once."""
    deliver: str = "best"
    """best: the current student where decide scores it above the champion, else the champion. champion: the proven one."""
    checkpoint_s: float = 5.0
    """Seconds between checkpoints; 0 writes one after every iteration."""
    teacher_network: str = "mlp:hidden=256-256"
    """Recipe of the teacher that is trained where none is named: its network ..."""
    teacher_budget: str = "2000"
    """... and its budget."""
    splits: Fractions = Fractions()
    """Shares of the four splits."""
    ev3: EV3 = EV3()
    """The core."""

    def __post_init__(self) -> None:
        _check_run(self.seed, self.confidence, self.checkpoint_s)
        Budget.parse(self.budget)
        Budget.parse(self.teacher_budget)
        _check(self.deliver in ("best", "champion"), "deliver is best or champion", f"'{self.deliver}'", "try best")


@dataclasses.dataclass(frozen=True)
class Teach:
    """Train a teacher from a recipe: the same run with labels alone."""

    data: str = "digits"
    """Source of examples: digits (embedded), or npz:FILE."""
    network: str = "mlp:hidden=256-256"
    """Network to train: mlp:hidden=W-W-..., or MODULE:FACTORY of your own."""
    budget: str = "2000"
    """Cost allowed: training steps (2000), epochs of the explore split (10e), or wall time (2m)."""
    seed: int = 0
    """Of the splits, the initial parameters, the batches and all keys. Use the same for compress: its test split must be
    new to the teacher too."""
    confidence: float = 0.95
    """Of the certificate."""
    checkpoint_s: float = 5.0
    """Seconds between checkpoints; 0 writes one after every iteration."""
    splits: Fractions = Fractions()
    """Shares of the four splits."""
    ev3: EV3 = EV3()
    """The core."""

    def __post_init__(self) -> None:
        _check_run(self.seed, self.confidence, self.checkpoint_s)
        Budget.parse(self.budget)


def _check_run(seed: int, confidence: float, checkpoint_s: float) -> None:
    _check(0 <= seed < 2**31, "seed must be 0 to 2^31 - 1", seed, "try 0")
    _check(0.5 <= confidence < 1, "confidence must be at least 0.5 and below 1", confidence, "try 0.95")
    _check(checkpoint_s >= 0, "checkpoint_s must not be negative", checkpoint_s, "try 5")
