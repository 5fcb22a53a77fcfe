"""Paired comparisons of two students on the same examples: mean differences, and one-sided tests that one is better.

References:
  Q. McNemar: Note on the sampling error of the difference between correlated proportions. Psychometrika 12 (2), 1947.
  R. L. Berger: Multiparameter hypothesis testing and acceptance sampling. Technometrics 24 (4), 1982.
  I. Waudby-Smith, A. Ramdas: Estimating means of bounded random variables by betting. JRSS B 86 (1), 2024.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc

BETS = (0.95, *(0.5**i for i in range(1, 9)))  # fractions of the capital that the bets of `betting` stake
AVERAGED_SIZE = 3  # examples of a unit, on average, from which on their mean beats one of them; as in the certificate

PairedTest = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
# (candidate [N], champion [N]) -> (wins, losses, p-value)


def paired(scores: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean difference of scores over the last axis, the examples, and its standard error."""
    difference = scores - reference
    n = difference.shape[-1]
    return difference.mean(axis=-1), difference.std(axis=-1) / jnp.sqrt(jnp.maximum(n - 1, 1))


def suitable_test(*, binary: bool, unit: jax.Array | tuple[()] = (), lone: jax.Array | tuple[()] = ()) -> PairedTest:
    """The test that suits the scores: McNemar's for scores of 0 or 1, betting for other scores in [0, 1].

    Args:
      binary: whether scores are 0 or 1.
      unit: [N] int32, the independent unit of each example, see `Batch.unit`. The test then bets on the units' mean scores; or
        it takes one example of each unit, where units have fewer than AVERAGED_SIZE examples on average.
      lone: [U] int32, the row of one example of each unit.
    """
    test = mcnemar if binary else betting
    if isinstance(unit, tuple):
        return test
    if not isinstance(lone, tuple) and unit.shape[0] < AVERAGED_SIZE * lone.shape[0]:
        return lambda candidate, champion: test(candidate[lone], champion[lone])
    return lambda candidate, champion: betting(means_of_units(candidate, unit), means_of_units(champion, unit))


def means_of_units(scores: jax.Array, unit: jax.Array) -> jax.Array:
    """The mean score of each unit, [N], 0 behind the last unit: a pair of zeros is no evidence of a paired test.

    Args:
      scores: [N].
      unit: [N] int32 from 0.
    """
    n = scores.shape[0]
    count = jax.ops.segment_sum(jnp.ones_like(scores), unit, n)
    return jax.ops.segment_sum(scores, unit, n) / jnp.maximum(count, 1)


def mcnemar(candidate: jax.Array, champion: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Exact one-sided McNemar test that the candidate is right more often (McNemar 1947).

    Args:
      candidate: [N] scores in {0, 1}.
      champion: [N] scores in {0, 1}, for the same examples.

    Returns: wins, losses (int32: examples that only one of them gets right) and the p-value P(Bin(wins + losses, 1/2)
      >= wins), which is 1 if nothing differs: a tie goes to the champion. nan scores count as wrong. The p-value is
      rounded up by more than the error of the float32 incomplete beta function, some 2e-6 of it per differing example.
    """
    candidate, champion = candidate > 0.5, champion > 0.5
    wins = (candidate & ~champion).sum()
    losses = (champion & ~candidate).sum()
    return wins, losses, _sign_p_value(wins, losses)


def _sign_p_value(wins: jax.Array, losses: jax.Array) -> jax.Array:
    """P(Bin(wins + losses, 1/2) >= wins), rounded up; 1 without wins."""
    tail = betainc(jnp.maximum(wins, 1).astype(jnp.float32), losses + 1.0, 0.5)
    rounded_up = jnp.minimum(tail * (1 + 1e-5 + 2e-6 * (wins + losses)), 1.0)
    return jnp.where(wins > 0, rounded_up, 1.0)


def least_mean(
    candidate: jax.Array, champion: jax.Array, strata: jax.Array, *, number: int, focus: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Exact one-sided test that the candidate's least mean over strata, such as classes, is higher than the champion's.

    The least mean is higher if the candidate's mean in *every* stratum c is higher than the champion's in one stratum j.
    For each c McNemar's test compares pairs: the r-th example of c, under the candidate, with the r-th example of j,
    under the champion. For c = j that is the same example; otherwise the two are independent. If the candidate's mean
    in c is not higher, a pair is won with no greater probability than it is lost. All these tests must succeed, so each
    has the full level (an intersection-union test, Berger 1982). It is valid for every j that does not depend on these
    examples. Strata without examples are not part of the claim.

    Args:
      candidate: [N] scores in {0, 1}.
      champion: [N], for the same examples.
      strata: [N] int32, -1 for examples of none.
      number: of strata.
      focus: int32, the stratum j: the champion's worst on other examples.

    Returns: wins, losses and pairs (int32) of the stratum with the greatest p-value, and this p-value.
    """
    own = jnp.where(strata >= 0, strata, number)
    count = jax.ops.segment_sum(jnp.ones_like(own), own, number + 1)
    order, n = jnp.argsort(own, stable=True), own.shape[0]
    rank = jnp.zeros_like(own).at[order].set(jnp.arange(n, dtype=own.dtype)) - (jnp.cumsum(count) - count)[own]
    right = jnp.zeros(n, bool).at[jnp.where(own == focus, rank, n)].set(champion > 0.5, mode="drop")[rank]
    pairs = rank < count[focus]
    won, lost = (pairs & (candidate > 0.5) & ~right), (pairs & right & ~(candidate > 0.5))
    wins, losses = (jax.ops.segment_sum(x.astype(jnp.int32), own, number + 1)[:number] for x in (won, lost))
    p_values = jnp.where(count[:number] > 0, _sign_p_value(wins, losses), 0.0)
    least = jnp.argmax(p_values)
    proof = jnp.where(count[focus] > 0, p_values[least], 1.0)
    return wins[least], losses[least], jnp.minimum(count[least], count[focus]), proof


def betting(candidate: jax.Array, champion: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Paired one-sided test that the candidate's mean is higher, for scores in [0, 1].

    Bets on the differences d_i. The capital W = mean over bets b of prod_i (1 + b d_i) has a mean of at most 1 if sum_i
    E[d_i] <= 0, the d_i being independent; so 1 / W is a p-value by Markov's inequality (Waudby-Smith and Ramdas 2024).
    The generality has a price: on scores of 0 or 1 McNemar's test has more power. nan scores prove nothing.

    Args:
      candidate: [N].
      champion: [N], for the same examples.

    Returns:
      wins, losses (int32: examples with a higher, a lower score) and the p-value.
    """
    difference = candidate - champion
    capital = jax.scipy.special.logsumexp(
        jnp.stack([jnp.log1p(bet * difference).sum() for bet in BETS]) - jnp.log(float(len(BETS)))
    )
    p_value = jnp.where(jnp.isnan(capital), 1.0, jnp.minimum(jnp.exp(-capital) * (1 + 1e-4), 1.0))
    return (difference > 0).sum(), (difference < 0).sum(), p_value


def proves(candidate: jax.Array, champion: jax.Array, alpha: float, *, binary: bool = True) -> jax.Array:
    """Whether the test proves at the level alpha < 1/2 that the candidate is better, a scalar bool.

    A candidate whose mean score is not higher proves nothing, and its p-value is not computed.
    """
    one, other = (candidate > 0.5, champion > 0.5) if binary else (candidate, champion)
    ahead = one.sum() > other.sum()
    test = suitable_test(binary=binary)
    return jax.lax.cond(ahead, lambda: test(candidate, champion)[2] <= alpha, lambda: jnp.bool_(False))
