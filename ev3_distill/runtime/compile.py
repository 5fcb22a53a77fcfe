"""XLA compiler options that replace slow defaults.

XLA:CPU of jaxlib 0.10 passes convolutions with 32 or more filters to a library that runs them on one core. Without it, a
training step of ResNet-8 (batches of 128, 2 cores) takes 0.76 of the time, and one of ResNet-20 0.74. Small MLPs are not
affected.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

FUSION = "xla_cpu_experimental_ynn_fusion_type"
ALL_BUT_CONVOLUTIONS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options for `jax.jit` and `compile` on the default backend; none if jaxlib does not know them or XLA_FLAGS sets them."""
    if jax.default_backend() != "cpu" or FUSION in os.environ.get("XLA_FLAGS", ""):
        return {}
    options = {FUSION: ALL_BUT_CONVOLUTIONS}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError:  # another version of jaxlib
        return {}
    return options


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` with these compiler options. Use it for the outermost function only."""
    return jax.jit(function, compiler_options=compiler_options(), **options)
