"""The central types: the data that flows between the rooms. Imports jax only.

Shapes: B examples of a batch, N of a split, K classes, P proposals, A arms, G goals. Costs are training steps (one gradient of
one batch), summed over all arms. Scores are per example, higher is better.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

PyTree = Any

MOST_GROUPS = 256  # largest number of subgroups of a data set


class Variables(NamedTuple):
    """All arrays of a network."""

    params: PyTree  # trained by gradients
    stats: PyTree  # not trained by gradients, such as BatchNorm statistics


class Batch(NamedTuple):
    """A batch of examples, or a whole split (then B is N)."""

    inputs: jax.Array  # [B, ...] float32, or uint8, which networks read as x / 255
    targets: PyTree  # leaves [B, ...], such as labels [B] int32; -1 (integer) or nan (float) where missing
    teacher: Mapping[str, jax.Array]  # the teacher's outputs by name, [B, ...] float32, such as logits or features
    index: jax.Array  # type: ignore[assignment]  # [B] int32, position in the data set
    weight: jax.Array  # [B] float32, weight of the example in a loss
    group: jax.Array | tuple[()] = ()  # [B] int32, the example's group from 0, in held-out splits of grouped data
    unit: jax.Array | tuple[()] = ()  # [B] int32, the example's independent unit from 0, where it is no unit itself
    lone: jax.Array | tuple[()] = ()  # [U] int32, the row of one example of each unit

    def one_per_unit(self, outputs: PyTree) -> tuple[PyTree, "Batch"]:
        """Outputs [B, ...] and the batch, reduced to one example of each unit [U, ...]; unchanged where examples are units."""
        if isinstance(self.lone, tuple):
            return outputs, self
        rows, batch = self.lone, self._replace(unit=(), lone=())
        reduced: tuple[PyTree, Batch] = jax.tree.map(lambda leaf: leaf[rows], (outputs, batch))
        return reduced


class Pools(NamedTuple):
    """The three splits that a run may see. The fourth split, test, is sealed and not part of this."""

    explore: PyTree  # trains students: `Sample` makes batches of it; if its field `final` is true, of all three splits
    assess: Batch  # selects among proposals
    decide: Batch  # proves promotions
    seen: Batch | None = None  # a part of explore without augmentation, see core/plateau

    def explore_in(self, *, final: jax.Array) -> PyTree:
        """What the arms train on: `explore`, and in the final phase of a run (`final`, a scalar bool) all three splits."""
        return self.explore._replace(final=final) if hasattr(self.explore, "final") else self.explore


class Apply(Protocol):
    """A network's forward pass."""

    def __call__(
        self, variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Variables]:
        """Returns outputs [B, ...] and the variables, with updated statistics if `train`."""


class Straight(Protocol):
    """A forward pass with rounded weights, whose gradients pass straight through the rounding."""

    def __call__(
        self,
        variables: Variables,
        inputs: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        share: jax.typing.ArrayLike = 1.0,
    ) -> tuple[jax.Array, Variables]:
        """Returns what `Apply` returns, for weights moved by the fraction `share` towards the rounded ones."""


class Features(Protocol):
    """A network's forward pass that returns intermediate features, too."""

    def __call__(
        self, variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Variables]:
        """Returns (logits [B, K], features [B, ...] by name) and the variables as `Apply` does."""


Fit = Callable[[Variables, jax.Array], Variables]  # (variables, inputs [B, ...]) -> variables with statistics


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A student or a teacher as pure functions, with the plain data from which it is rebuilt."""

    init: Callable[[jax.Array], Variables]  # key -> variables
    apply: Apply
    spec: Mapping[str, Any]
    features: Features | None = None  # if the network has features; the logits are those of `apply`
    straight: Straight | None = None  # if the network is deployed with rounded weights
    fit: Fit | None = None  # if evaluation needs statistics of inputs that training does not collect


Loss = Callable[[Any, Batch], jax.Array]  # (outputs [B, ...], batch) -> scalar
Objective = Callable[[Any, Batch], jax.Array]  # (outputs [N, ...], split) -> score [N], higher is better
Sample = Callable[[PyTree, jax.Array], Batch]  # (pools.explore, global step) -> the batch of that step
Draw = Callable[[jax.Array], tuple[Batch, jax.Array]]  # global step -> (batch, key of that step)
Distribute = Callable[[Callable[[jax.Array, PyTree], tuple[PyTree, ...]], jax.Array, PyTree], tuple[PyTree, ...]]
# (work, active [P] bool, inputs) -> the results of `work(own [P] bool, inputs)`, one tree for each of P rows. `own` marks the
# rows that this device computes; the results of other rows are ignored and should cost nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Promise:
    """The score that promotions must prove to be higher and that the certificate promises."""

    name: str  # such as accuracy; names on disk and on screens come from it
    score: Objective  # in [0, 1]
    binary: bool  # whether scores are 0 or 1: McNemar's test then proves promotions, else betting does


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """A requirement on a student: a metric, higher is better, must be at least `threshold`.

    A metric of a whole split, such as the accuracy on the worst class, also has scores per example: its value plus each
    example's influence on it. Their mean is the metric, and their spread gives its standard error.
    """

    name: str
    threshold: float
    score: Objective  # its mean over a split is the metric
    smooth: Objective  # detects the small steps of one trajectory towards the goal
    focus: Callable[[Any, Batch], jax.Array]  # (outputs, split) -> int32: the class or group it is about, or 0 for all
    comparison: Callable[[Any, Batch, jax.Array], jax.Array]  # (outputs, split, focus) -> [N] in [0, 1]: the score
    # whose mean a promotion for this goal proves to be higher
    binary: bool  # whether the scores of `comparison` are 0 or 1
    p_value: Callable[[Any, Batch], jax.Array]  # (outputs, split) -> p-value of "the metric is below the threshold"
    hypothesis: str = ""  # what the test of a promotion for this goal proves; {focus} stands for the class or group
    strata: Callable[[Any, Batch], tuple[jax.Array, int]] | None = None  # if the metric is the least of the strata's
    # means: (outputs, split) -> [N] int32, -1 for none; and their number


class Stretch(NamedTuple):
    """The part of a run that a trajectory covers, scalars."""

    start: jax.Array  # int32, its first global step
    steps: jax.Array  # int32
    spent: jax.Array  # float32, fraction of the student's budget (since it started or grew) spent before it
    per_step: jax.Array  # float32, fraction that each of its steps adds, parallel arms included


class Growth(Protocol):
    """Maps a student to a larger one that computes the same."""

    def variables(self, variables: Variables) -> Variables:
        """The larger student's variables."""


class Arm(NamedTuple):
    """A way to improve a student: an (init, propose) pair like an optax transformation.

    The arm's state holds everything that its trajectory needs to continue (iterate, optimizer state, averages), because its
    proposal may be something else (an average). `propose` with zero steps must work and cost little.
    """

    name: str
    init: Callable[[Variables], PyTree]  # student -> state of a fresh start from it
    propose: Callable[..., tuple[PyTree, Variables]]
    # (state, draw, stretch) -> (state, proposed student); if `uses_held_out`, a draw of assess is its fourth argument
    length: float = 1.0  # of this arm's trajectories, relative to the run's
    uses_held_out: bool = False  # whether it needs held-out batches, to tune its loss by them
    hyperparameters: Callable[[PyTree], dict[str, jax.Array]] | None = None  # state -> tuned values, for the ledger
    races: bool = True  # whether it takes part in the race at the start of a run; otherwise it waits to be asked
    starts_fast: bool = True  # whether a short race shows its worth: its rate does not warm up over the budget


class Proposals(NamedTuple):
    """Results of explore, one row for each arm: P is A."""

    variables: Variables  # leaves [P, ...]
    arm_states: tuple[PyTree, ...]  # [A]
    active: jax.Array  # [P] bool, computed in this iteration and finite


class GoalEvidence(NamedTuple):
    """Scores for G goals, per example."""

    smooth: jax.Array  # [P, G, N]
    score: jax.Array  # [P, G, N]
    focus: jax.Array  # [P, G] int32


class Evidence(NamedTuple):
    """Results of assess: scores on one split, per example."""

    select: jax.Array  # [P, N] smooth score, which detects the small steps of one trajectory
    promise: jax.Array  # [P, N] score that compares arms and that promotions prove, in [0, 1]
    goals: GoalEvidence | tuple[()] = ()  # if the run has goals


class GoalScores(NamedTuple):
    """A champion's scores for G goals on decide."""

    comparison: jax.Array  # [G, N] what a challenger must prove to beat, at the focus of the champion
    metric: jax.Array  # [G] the goals' own values


class Objectives(NamedTuple):
    """The scores by which students are selected and promoted."""

    select: Objective  # smooth: detects the small steps of one trajectory on assess
    promise: Promise  # compares arms on assess, and decide proves promotions by it
    goals: tuple[Goal, ...] = ()  # requirements; the one at the greatest risk takes precedence, see core/prioritise.py

    def evidence(self, outputs: Any, split: Batch) -> Evidence:
        """The scores of one student with these outputs, leaves [N]; those for goals [G, N]."""
        smooth, promise = self.select(outputs, split), self.promise.score(outputs, split)
        return Evidence(smooth, promise, self._goal_evidence(outputs, split))

    def _goal_evidence(self, outputs: Any, split: Batch) -> GoalEvidence | tuple[()]:
        if not self.goals:
            return ()
        return GoalEvidence(
            smooth=jnp.stack([goal.smooth(outputs, split) for goal in self.goals]),
            score=jnp.stack([goal.score(outputs, split) for goal in self.goals]),
            focus=jnp.stack([goal.focus(outputs, split) for goal in self.goals]),
        )

    def goal_scores(self, outputs: Any, split: Batch, evidence: Evidence) -> GoalScores | tuple[()]:
        """The goals' scores on decide of a student, compared at the focus that `evidence` on assess has."""
        if not isinstance(evidence.goals, GoalEvidence):
            return ()
        focus = evidence.goals.focus
        return GoalScores(
            comparison=jnp.stack([goal.comparison(outputs, split, focus[g]) for g, goal in enumerate(self.goals)]),
            metric=jnp.stack([goal.score(outputs, split).mean() for goal in self.goals]),
        )

    @property
    def thresholds(self) -> jax.Array:
        """Thresholds of the goals, [G]."""
        return jnp.array([goal.threshold for goal in self.goals], jnp.float32)


class Clock(NamedTuple):
    """Counters of a run, int32 scalars. Costs are training steps of all arms."""

    iteration: jax.Array
    cost: jax.Array  # so far
    start_cost: jax.Array  # the cost when the student started, or last grew
    position: jax.Array  # the next global step: names batches and keys, common to all arms
    stale: jax.Array  # iterations since the current student last changed
    tested_cost: jax.Array  # the cost at the last promotion test on decide
    met_cost: jax.Array  # the cost at the last test on decide whether all goals are met


class CurrentStudent(NamedTuple):
    """The student from which exploration starts."""

    variables: Variables
    evidence: Evidence  # on assess, leaves [N]
    arm: jax.Array  # int32, the arm that proposed it; -1 for none


class Champion(NamedTuple):
    """The student that tests on decide have proven."""

    variables: Variables
    evidence: Evidence  # on assess, leaves [N]
    decide: jax.Array  # [N] its promise scores on decide
    goals: GoalScores | tuple[()]  # on decide, if the run has goals


class SafestStudent(NamedTuple):
    """Of all students that were current, the one farthest above its nearest goal on assess."""

    variables: Variables | tuple[()]  # () without goals
    risk: jax.Array  # float32, standard errors above the goal nearest to it


class ArmsState(NamedTuple):
    """The arms of a run and how compute is allocated to them."""

    states: tuple[PyTree, ...]  # [A] each arm's own state: arms train students of their own
    value: jax.Array  # [A] paired difference from the best arm beside it, in standard errors; 0 is level
    lag: jax.Array  # [A] difference of its newest proposal from the current student, in standard errors, smoothed
    cost: jax.Array  # [A] int32, steps spent
    wins: jax.Array  # [A] int32, proposals that became current
    promotions: jax.Array  # [A] int32, proposals that became champion
    leader: jax.Array  # int32, the arm that trains on when the race is over
    racing: jax.Array  # [A] bool, still in the race; the race is over when one is left
    raced: jax.Array  # int32, steps of each racing arm since the race began
    asked: jax.Array  # int32, the arm that trains beside the leader from the current student, as nothing moved; or -1
    length: jax.Array  # float32, the last trajectory length in steps


class ErrorBudget(NamedTuple):
    """Position in the tree of promotion tests, scalars; see core/adapt.py."""

    tests: jax.Array  # int32, paired tests on decide so far
    promotions: jax.Array  # int32, of which promoted
    left: jax.Array  # float32, probability of a false promotion that may still be spent


class Plateau(NamedTuple):
    """Where the student stood when it last improved; see core/plateau.py."""

    assess: Evidence  # leaves [N]
    seen: jax.Array  # [N'] promise scores on `Pools.seen`
    position: jax.Array  # int32
    until: jax.Array  # int32, the cost at which the student has used its part of a search's budget
    stuck: jax.Array  # bool, whether it has not improved for as long as the run's patience, or that part is used up


class BeforeFinal(NamedTuple):
    """Where the run stood when its final phase began: nothing was decided since."""

    variables: Variables  # of the current student
    cost: jax.Array  # int32


class State(NamedTuple):
    """The complete state of a run, one pytree: everything that a resumed run needs."""

    key: jax.Array  # data of the run's PRNG key, uint32
    clock: Clock
    current: CurrentStudent
    champion: Champion
    safest: SafestStudent
    arms: ArmsState
    budget: ErrorBudget
    plateau: Plateau | tuple[()]  # () if the run's patience has no end
    met: jax.Array  # bool, whether decide proved all goals of the current student, in a run that then ends
    final: jax.Array  # bool, whether the run trains on assess and decide as well: nothing is decided any more
    before: BeforeFinal | tuple[()]  # () if the run has no final phase; of no meaning until it begins
    closed: jax.Array  # bool, whether the closing iteration was made: the run is finished


KEEP, ADOPT, PROMOTE, ROLL_BACK, FINAL = range(5)
VERDICTS = ("keep", "adopt", "promote", "roll back", "final phase")


class PromotionTest(NamedTuple):
    """A paired test of the current student against the champion on decide, scalars."""

    tested: jax.Array  # bool, whether there was one in this iteration
    goal: jax.Array  # int32, the goal that it is about, -1 for the promise
    focus: jax.Array  # int32, the class or group that the champion's goal is about; 0 if it is about all examples
    wins: jax.Array  # int32, pairs in which the candidate has the higher score, in the decisive comparison
    losses: jax.Array  # int32, a lower one
    n: jax.Array  # int32, pairs
    counts: jax.Array  # bool, whether the p-value follows from wins and losses alone, as McNemar's does
    alpha: jax.Array  # float32, the level of the test
    p_value: jax.Array  # float32, 1 if not tested
    promoted: jax.Array  # bool
    breaks: jax.Array  # bool, whether a proven candidate was blocked because it breaks a goal that the champion meets
    lowers: jax.Array  # bool, or because it lowers the metric of the goal itself on decide


class Decision(NamedTuple):
    """The outcome of one iteration: one ledger row. Scalars unless stated."""

    iteration: jax.Array  # int32
    cost: jax.Array  # int32, steps of all arms so far
    position: jax.Array  # int32
    steps: jax.Array  # [A] int32, each arm's in this iteration
    scores: jax.Array  # [P] mean select score on assess, nan if inactive
    promise_scores: jax.Array  # [P] mean promise score on assess, nan if inactive
    behind: jax.Array  # [A] mean paired difference from the best arm beside it, at most 0; nan without a proposal
    behind_se: jax.Array  # [A] its standard error
    racing: jax.Array  # [A] bool, still in the race after this iteration
    asked: jax.Array  # int32, the arm that trained beside the leader because nothing had moved; -1 if none
    selected: jax.Array  # int32, the arm with the best proposal; -1 if none was finite
    discarded: jax.Array  # int32, non-finite proposals
    ruling: jax.Array  # int32, the goal that selection followed, -1 for the promise
    risks: jax.Array  # [G] standard errors of the current student above each goal on assess
    gain: jax.Array  # float32, mean paired gain of the selected proposal over current on assess, in the ruling score
    gain_se: jax.Array  # float32, its standard error
    promotion: PromotionTest
    verdict: jax.Array  # int32, an index of VERDICTS
    promoted_arm: jax.Array  # int32, the arm that proposed the new champion, -1 if none
    champion_score: jax.Array  # float32, mean promise score on decide
    current_score: jax.Array  # float32, mean promise score on assess
    length: jax.Array  # float32, trajectory length
    tuned: tuple[dict[str, jax.Array], ...]  # [A] current hyperparameters of arms that tune any, else {}
    stuck: jax.Array  # bool, whether the student no longer improves at its size
    met: jax.Array  # bool, whether all goals are proven on decide, in a run that then ends
    final: jax.Array  # bool, whether this iteration trained on assess and decide, too
    closed: jax.Array  # bool, whether this was the closing iteration
