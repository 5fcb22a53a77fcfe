"""`digits`: a built-in data set.

The test part of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
doi:10.24432/C50P49, license CC BY 4.0: counts of ink pixels in 8x8 blocks, 0 to 16. scikit-learn's `load_digits` has the same
examples in the same order.
"""

from pathlib import Path

import numpy as np

from ev3_distill.data.sources.dataset import Dataset, ReadOptions, fingerprint


def load(place: str, options: ReadOptions) -> Dataset:
    """Loads the 1,797 digits [8, 8, 1], scaled to [0, 1]."""
    del place, options
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        inputs = (arrays["images"][..., None] / 16).astype(np.float32)
        labels = arrays["labels"].astype(np.int32)
    names = tuple(map(str, range(10)))
    return Dataset(inputs, labels, len(names), names, None, "digits", fingerprint(inputs, labels, None))
