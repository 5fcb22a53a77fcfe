"""The EV3 core: explore, assess, adapt, and the step that composes them. It knows no task, arm or network."""

from ev3_distill.core.algorithm import Algorithm, Ending
from ev3_distill.core.first_state import initial_state
from ev3_distill.core.step import Parts, Plan, Step, make_parts, make_step
from ev3_distill.types import Objectives

__all__ = ["Algorithm", "Ending", "Objectives", "Parts", "Plan", "Step", "initial_state", "make_parts", "make_step"]
