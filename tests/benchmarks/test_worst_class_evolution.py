"""Benchmark of evolution on objectives without gradient: quantization, training examples and table."""

import jax.numpy as jnp
import numpy as np

from ev3_distill.benchmarks import worst_class_evolution
from ev3_distill.data import batches
from ev3_distill.types import Pools, Variables


def test_matrices_are_quantized_per_tensor_and_vectors_are_not():
    seen = []

    def apply(variables, inputs, *, train):
        seen.append(variables.params)
        return inputs, variables

    params = {"w": jnp.array([[127.0, -3.4], [0.6, 0.0]]), "b": jnp.array([0.123]), "zero": jnp.zeros((2, 2))}
    worst_class_evolution.quantized(apply)(Variables(params, {}), jnp.zeros(1), train=False)
    np.testing.assert_allclose(seen[0]["w"], [[127, -3], [1, 0]])
    np.testing.assert_array_equal(seen[0]["b"], params["b"])
    np.testing.assert_array_equal(seen[0]["zero"], params["zero"])


def test_arm_learns_from_the_named_splits():
    """4 examples on explore and 2 on assess."""
    logits = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    explore = batches.resident(
        np.zeros((4, 3), np.float32), np.zeros(4, int), np.arange(4), {"logits": logits[:4][None]}, seed=0
    )
    assess = batches.held_out(np.ones((2, 3), np.float32), np.ones(2, int), np.arange(4, 6), {"logits": logits[4:]})
    pools = Pools(explore, assess, assess)
    for where, index in (("explore", range(4)), ("assess", (4, 5)), ("both", range(6))):
        examples = worst_class_evolution._examples(pools, where, 0).examples
        np.testing.assert_array_equal(examples.index, list(index))
        np.testing.assert_array_equal(examples.teacher["logits"][0], logits[list(index)])
        np.testing.assert_array_equal(examples.targets, [int(i > 3) for i in index])


def test_table_compares_with_the_best_gradient_arm_in_hindsight():
    figures = {"stays": (0.80, 0.90), "kd4": (0.82, 0.90), "ce-balanced": (0.81, 0.91)}
    figures |= dict.fromkeys(worst_class_evolution.GRADIENTS[1:3], (0.7, 0.8)) | {"ce-half-balanced": (0.7, 0.8)}
    figures |= {name: (0.84, 0.88) for name in worst_class_evolution.WORST} | {worst_class_evolution.INT8: (0.8, 0.905)}
    rows = [
        {"seed": seed, "start": "kd4", "contender": name, "cost": 8000, "worst_class_accuracy": worst + seed / 100,
         "accuracy": int8, "int8_accuracy": int8}
        for seed in range(3) for name, (worst, int8) in figures.items()
    ]  # fmt: skip
    text = worst_class_evolution.table(rows)
    assert "worst class: evolution, last biases minus kd4: 2.00 (2.00 to 2.00) points, target > 0: held" in text
    assert "accuracy as int8: evolution, as int8 minus ce-balanced: -0.50 (-0.50 to -0.50) points" in text
    assert "| kd4 | 83.00 ± " in text
