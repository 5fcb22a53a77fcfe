"""Distributed evolution strategies (arXiv 2201.00093). Nothing here depends on a task, an arm or a network."""

from ev3_distill.evolution.layerwise import Block, estimate_by_blocks
from ev3_distill.evolution.population import Fitness, Population, PopulationStats, estimate
from ev3_distill.evolution.strategy import Evolution, EvolutionConfig, EvolutionState, evolution
from ev3_distill.evolution.subspace import Subspace, all_parameters, parameters_named
from ev3_distill.evolution.unrolls import UnrollConfig, noise_reuse

__all__ = [
    "Block",
    "Evolution",
    "EvolutionConfig",
    "EvolutionState",
    "Fitness",
    "Population",
    "PopulationStats",
    "Subspace",
    "UnrollConfig",
    "all_parameters",
    "estimate",
    "estimate_by_blocks",
    "evolution",
    "noise_reuse",
    "parameters_named",
]
