"""What tests of bounds share: random counts, confidences and samples, and how often a bound may fail."""

import numpy as np
from hypothesis import strategies as st
from scipy.stats import binom

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.floats(0.5, 0.999)
samples = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(np.array)


def allowed(trials, risk):
    """The largest number of failures that is consistent with this error probability at a level of 0.001."""
    return binom.isf(0.001, trials, risk)
