"""The EV3 core: explore, assess, adapt, and the step that composes them. Knows no concrete arm, loss or network."""

from ev3_distill.core.step import Parts, Plan, initial_state, make_parts, make_step

__all__ = ["Parts", "Plan", "initial_state", "make_parts", "make_step"]
