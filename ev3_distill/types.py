"""The central types: what flows between the rooms. Imports jax only.

Shapes: B examples of a batch, N of a split, K classes, P proposals, A arms. Costs are training steps (one gradient of one
batch), summed over all arms. Scores are per example, higher is better.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

PyTree = Any

MOST_GROUPS = 256  # subgroups of a data set, at most


class Variables(NamedTuple):
    """All arrays of a network. Only `params` meets a gradient."""

    params: PyTree  # trained
    stats: PyTree  # not trained: BatchNorm statistics and the like


class Batch(NamedTuple):
    """A batch of examples, or a whole split (then B is N)."""

    inputs: jax.Array  # [B, ...] float32, or uint8, which networks take as x / 255
    targets: PyTree  # leaves [B, ...], such as labels [B] int32; -1 (integer) or nan (float) where missing
    teacher: Mapping[
        str, jax.Array
    ]  # the teacher's outputs by name, [B, ...] float32, such as logits; features as well
    index: jax.Array  # type: ignore[assignment]  # [B] int32, position in the data set: names the example
    weight: jax.Array  # [B] float32, of the example in a loss
    group: jax.Array | tuple[()] = ()  # [B] int32, the example's group from 0, in held-out splits of grouped data


class Pools(NamedTuple):
    """The data of a run: the three splits it may see. The fourth, test, is sealed and is no part of this."""

    explore: PyTree  # meets gradients: what `Sample` makes batches of
    assess: Batch  # selects among proposals
    decide: Batch  # proves promotions
    seen: Batch | None = (
        None  # some of explore as it is, where the run's patience ends: shows whether training gets anywhere
    )


class Apply(Protocol):
    """A network's forward pass."""

    def __call__(
        self, variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Variables]:
        """Returns logits [B, K] and the variables with their statistics updated (unchanged unless `train`)."""


class Straight(Protocol):
    """A forward pass that trains with weights rounded as they are deployed, with gradients that pass straight through."""

    def __call__(
        self,
        variables: Variables,
        inputs: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        share: jax.typing.ArrayLike = 1.0,
    ) -> tuple[jax.Array, Variables]:
        """Returns what `Apply` does, of weights that went this share of the way to the rounded ones."""


class Features(Protocol):
    """A network's forward pass that shows its features, too."""

    def __call__(
        self, variables: Variables, inputs: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Variables]:
        """Returns (logits [B, K], features [B, ...] by name) and the variables as `Apply` does."""


Fit = Callable[[Variables, jax.Array], Variables]  # (variables, inputs [B, ...]) -> with statistics of such inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A student or a teacher as pure functions, and the plain data it is rebuilt from."""

    init: Callable[[jax.Array], Variables]  # key -> variables
    apply: Apply
    spec: Mapping[str, Any]
    features: Features | None = None  # where the network shows any; the logits are those of `apply`
    straight: Straight | None = None  # of one that is deployed rounded
    fit: Fit | None = None  # where evaluation has to know of inputs what training does not tell


Loss = Callable[[Any, Batch], jax.Array]  # (outputs [B, ...], batch) -> scalar
Objective = Callable[[Any, Batch], jax.Array]  # (outputs [N, ...], split) -> score [N], higher is better
Sample = Callable[[PyTree, jax.Array], Batch]  # (pools.explore, global step) -> the batch of that step
Draw = Callable[[jax.Array], tuple[Batch, jax.Array]]  # global step -> (batch, key of that step)
Share = Callable[[Callable[[jax.Array, PyTree], tuple[PyTree, ...]], jax.Array, PyTree], tuple[PyTree, ...]]
# (work, active [P] bool, given) -> what `work` makes of what is given, a tree for each of P rows. It is told which rows are its
# own, [P] bool; what it makes of others does not count and should cost nothing


@dataclasses.dataclass(frozen=True, eq=False)
class Promise:
    """The score that promotions must prove to be higher and that the certificate promises."""

    name: str  # such as accuracy; names on disk and on screens come from it
    score: Objective  # in [0, 1]
    binary: bool  # whether scores are 0 or 1: promotions are then tested by McNemar's test, else by betting


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """What must hold of a student: that a metric, higher is better, is at least `least`.

    A metric of a whole split, such as the accuracy of the worst class, comes as scores too: its value plus each example's
    influence on it, so that their mean is the metric and their spread gives its standard error.
    """

    name: str
    least: float
    score: Objective  # the mean over a split is the metric
    smooth: Objective  # what sees the small steps of one trajectory towards it
    focus: Callable[[jax.Array, Batch], jax.Array]  # (logits [N, K], split) -> int32, what the metric is about now
    # (a class, a group), 0 where it is about all examples
    compared: Callable[[jax.Array, Batch, jax.Array], jax.Array]  # (logits, split, focus) -> [N] in [0, 1]: what a
    # promotion for this goal proves to be truly higher, in the mean
    shares: bool  # whether these are 0 or 1
    refuted: Callable[[jax.Array, Batch], jax.Array]  # (logits, split) -> p-value of "the metric is below `least`"


class Stretch(NamedTuple):
    """The part of a run that a trajectory covers, scalars."""

    start: jax.Array  # int32, its first global step
    steps: jax.Array  # int32
    spent: jax.Array  # float32, the share that was spent before it of the budget since the student began or grew
    each: jax.Array  # float32, the share that one of its steps adds, those of arms beside it included


class Growth(Protocol):
    """The map from a student's arrays to those of a larger one that computes the same; trees as `Variables.params` are."""

    def variables(self, variables: Variables) -> Variables:
        """Of a value of the student's arrays, such as an iterate or an average of them."""

    def like_gradient(self, tree: PyTree) -> PyTree:
        """Of a mean of gradients."""

    def like_second_moment(self, tree: PyTree) -> PyTree:
        """Of a mean of squared gradients."""


class Arm(NamedTuple):
    """A way to improve a student, an (init, propose) pair like an optax transformation.

    The arm's state holds all that its trajectory needs to go on (raw iterate, optimizer state, averages), because what it
    proposes may be something else (an average). `propose` with zero steps is allowed and must be cheap.
    """

    name: str
    init: Callable[[Variables], PyTree]  # student -> state of a fresh start from it
    propose: Callable[..., tuple[PyTree, Variables]]
    # (state, draw, where in the run) -> (state, proposed student); where it is `held`, a draw of assess is its fourth argument
    length: float = 1.0  # of this arm's trajectory, relative to the run's
    grow: Callable[[PyTree, Growth], PyTree] | None = (
        None  # state of this arm for the larger student; without, it starts
    )
    # afresh when the student grows
    held: bool = False  # whether it takes held-out batches, too: it tunes its loss by them
    shows: Callable[[PyTree], dict[str, jax.Array]] | None = (
        None  # state -> the hyperparameters that a ledger row tells
    )
    races: bool = True  # whether it takes part in the race that begins a run; else it only challenges who leads then


class Proposals(NamedTuple):
    """What explore hands to assess. Row P-1 may be the average of the others, which is no arm's own."""

    variables: Variables  # leaves [P, ...]
    arm_states: tuple[PyTree, ...]  # one per arm, of length A
    active: jax.Array  # [P] bool, made in this iteration and finite


class GoalEvidence(NamedTuple):
    """Scores for G goals, example by example."""

    smooth: jax.Array  # [P, G, N]
    score: jax.Array  # [P, G, N]
    focus: jax.Array  # [P, G] int32


class Evidence(NamedTuple):
    """What assess hands to adapt: scores of one split, example by example."""

    select: jax.Array  # [P, N] a smooth objective that sees the small steps of one trajectory
    promise: jax.Array  # [P, N] the objective that compares arms and that promotions prove, in {0, 1}
    goals: GoalEvidence | tuple[()] = ()  # where the run has any


class Standing(NamedTuple):
    """A champion's scores for G goals on decide."""

    compared: jax.Array  # [G, N] what a challenger must prove to beat, at the focus of the champion
    metric: jax.Array  # [G]


class ErrorBudget(NamedTuple):
    """Where in the tree of tests a run has come to, scalars (see core/adapt.py)."""

    tests: jax.Array  # int32, paired tests made on decide
    promotions: jax.Array  # int32, of which promoted
    left: jax.Array  # float32, the probability of a false promotion that may still be spent


class Progress(NamedTuple):
    """Where the student stood when it last got anywhere."""

    assess: Evidence  # leaves [N]
    seen: jax.Array  # [N'] promise scores on `Pools.seen`
    position: jax.Array  # int32
    until: jax.Array  # int32, the cost at which its share of a search's budget is spent
    stuck: jax.Array  # bool, whether it has got nowhere since for as long as the run's patience, or that share is spent


class State(NamedTuple):
    """Everything that a resume needs, one pytree."""

    key: jax.Array  # the data of the run's PRNG key, uint32
    iteration: jax.Array  # int32
    cost: jax.Array  # int32, steps of all arms
    begun: jax.Array  # int32, that cost when the student began, or last grew
    position: jax.Array  # int32, the next global step: names batches and keys, common to all arms
    current: Variables  # where exploration stands
    current_evidence: Evidence  # its scores on assess, leaves [N]
    champion: Variables  # the proven best
    champion_evidence: Evidence  # its scores on assess, leaves [N]
    champion_decide: jax.Array  # [N] its promise scores on decide
    champion_goals: Standing | tuple[()]  # on decide, where the run has goals
    safest: (
        Variables | tuple[()]
    )  # of all students that were current, the one least at risk on assess; none without goals
    safest_risk: jax.Array  # float32, by how many standard errors it lay above the goal nearest to it
    arm_states: tuple[PyTree, ...]  # each arm's, ready to go on from `current`
    arm_value: jax.Array  # [A] how each arm compares with the best beside it, in standard errors, 0 is level
    arm_cost: jax.Array  # [A] int32, steps spent
    arm_wins: jax.Array  # [A] int32, times its proposal became current
    arm_promotions: jax.Array  # [A] int32, times its proposal became champion
    leader: jax.Array  # int32, the arm that exploration exploits
    round: jax.Array  # int32, iterations since the arms' race began
    current_arm: jax.Array  # int32, the arm that made `current`; A for the average, -1 for none
    length: jax.Array  # float32, present trajectory length in steps
    stale: jax.Array  # int32, iterations since `current` last moved
    tested_cost: jax.Array  # int32, cost when decide was last asked
    budget: ErrorBudget
    progress: Progress | tuple[()]  # none where the run has no end to its patience
    met_cost: jax.Array  # int32, cost when decide was last asked whether all goals are met
    met: jax.Array  # bool, whether decide proved all goals of the current student, where that ends the run
    closed: jax.Array  # bool, whether the closing iteration was made: the run is finished


KEEP, ADOPT, PROMOTE, ROLL_BACK = range(4)
VERDICTS = ("keep", "adopt", "promote", "roll back")


class Decision(NamedTuple):
    """One iteration's outcome, scalars unless said: one ledger row."""

    iteration: jax.Array  # int32
    cost: jax.Array  # int32, steps of all arms so far
    position: jax.Array  # int32
    steps: jax.Array  # [A] int32, each arm's in this iteration
    scores: jax.Array  # [P] mean select score on assess, nan where not active
    selected: jax.Array  # int32, the best proposal: an arm, or A for the average; -1 where none was finite
    discarded: jax.Array  # int32, non-finite proposals
    ruling: jax.Array  # int32, the goal that selection followed, -1 for the promise
    risks: jax.Array  # [G] how far the current student is above each goal on assess, in standard errors
    gain: jax.Array  # float32, mean paired gain of the selected over current on assess, in the score that ruled
    gain_se: jax.Array  # float32, its standard error
    tested: jax.Array  # bool, whether decide was asked
    tested_for: jax.Array  # int32, the goal of which it was asked, -1 for the promise
    wins: jax.Array  # int32, decide examples that only the candidate gets right
    losses: jax.Array  # int32, that only the champion gets right
    decide_n: jax.Array  # int32
    alpha: jax.Array  # float32, the level of the test
    p_value: jax.Array  # float32, 1 where not tested
    verdict: jax.Array  # int32, an index of VERDICTS
    promoted_arm: jax.Array  # int32, the arm that made the new champion, -1 where none
    kept: (
        jax.Array
    )  # bool, whether a proof was not enough since the candidate would break a goal that the champion meets
    champion_accuracy: jax.Array  # float32, mean promise score on decide
    current_accuracy: jax.Array  # float32, mean promise score on assess
    length: jax.Array  # float32, next trajectory length
    tuned: tuple[
        dict[str, jax.Array], ...
    ]  # of each arm, the hyperparameters that it has come to; {} where it tunes none
    stuck: jax.Array  # bool, whether the student gets nowhere any more at its size
    met: jax.Array  # bool, whether all goals are proven on decide, where that ends the run
    closed: jax.Array  # bool, whether this was the closing iteration
