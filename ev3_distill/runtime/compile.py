"""XLA compiler options that replace slow defaults.

XLA:CPU of jaxlib 0.10 passes convolutions with 32 or more filters to a library that runs them on one core. Without it, a
training step of ResNet-8 (batches of 128, 2 cores) takes 0.76 of the time, and one of ResNet-20 0.74, where XLA computes the
convolutions. Small MLPs are not affected.

LLVM's first optimization level, without its expensive passes, compiles the default run in 0.83 of the time (two runs each), and
steps of an MLP, a ResNet-8 and a ViT take 0.97 to 1.03 of theirs (medians of 8 turns). XLA's other code generator for loops
(`xla_cpu_use_fusion_emitters=false`) would compile faster still, but steps take up to 1.2 times as long.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
}


@functools.cache
def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit` and `compile` on the default backend, without those that jaxlib does not know or XLA_FLAGS sets."""
    if jax.default_backend() != "cpu":
        return {}
    flags = os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in OPTIONS.items() if name not in flags}
    if _are_known(options):
        return options
    return {name: value for name, value in options.items() if _are_known({name: value})}  # another version of jaxlib


def _are_known(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(np.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` with these compiler options. Use it for the outermost function only."""
    return jax.jit(function, compiler_options=compiler_options(), **options)
