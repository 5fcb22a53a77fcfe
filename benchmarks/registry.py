"""The benchmark suites, by the name that `ev3-distill bench NAME` takes.

A suite is a module with

- `KEY`: the fields that identify a row;
- `collect(*, seeds, size, done) -> Iterator[row]`: measures the rows, except those whose keys are in `done`;
- `table(rows) -> str`: renders them as Markdown;
- `INTERVALS`: what the intervals in the table are, in one or two sentences for the documentation;
- a docstring: its first paragraph is the question, the rest is the method.

Optional members:

- `plot(rows)`: a matplotlib figure;
- `REPEATS`: the fields of KEY that number repetitions, if not `seed` alone;
- `REPETITION`: what a repetition is called, if not a seed;
- `TIMED`: the fields that depend on the machine;
- `measures(row)`: the measurements of a row, if they are not simply its numbers;
- a parameter `only` of `collect`: names of parts to measure, the option `--only`.
"""

from types import ModuleType

from ev3_distill.benchmarks import (
    certificate_coverage,
    convolution_speed,
    cost_growth,
    default_quality,
    evolution_cost,
    example_weights,
    false_promotions,
    growth_from_tiny,
    guard_steering,
    hypergradient_methods,
    int8_accuracy,
    iteration_overhead,
    memory_limit,
    portfolio_cost,
    protonet_evolution,
    protonet_sweeps,
    pytorch_quality,
    robustness,
    rotation_angle,
    search_smallest,
    tuned_arm,
    worst_class_evolution,
)

__all__ = ["SIZES", "SUITES"]

SUITES: dict[str, ModuleType] = {
    "coverage": certificate_coverage,
    "evolution": evolution_cost,
    "growth": growth_from_tiny,
    "guards": guard_steering,
    "hypergrad": hypergradient_methods,
    "int8": int8_accuracy,
    "memory": memory_limit,
    "noise": example_weights,
    "portfolio": portfolio_cost,
    "protonet": protonet_evolution,
    "pytorch": pytorch_quality,
    "quality": default_quality,
    "rescue": worst_class_evolution,
    "robustness": robustness,
    "rotation": rotation_angle,
    "safety": false_promotions,
    "scaling": cost_growth,
    "search": search_smallest,
    "speed": convolution_speed,
    "sweeps": protonet_sweeps,
    "throughput": iteration_overhead,
    "tuning": tuned_arm,
}
SIZES = ("full", "smoke")
