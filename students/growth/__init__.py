"""Growth makes a network larger and keeps its function; narrowing starts a smaller network from a part of a larger one."""

from ev3_distill.students.axes import Axis, GrowthSpec, Layer, Space, next_size, reads, writes
from ev3_distill.students.growth.grow import GrowthMap, grow, growth_map, moves
from ev3_distill.students.growth.narrow import narrow

__all__ = [
    "Axis",
    "GrowthMap",
    "GrowthSpec",
    "Layer",
    "Space",
    "grow",
    "growth_map",
    "moves",
    "narrow",
    "next_size",
    "reads",
    "writes",
]
