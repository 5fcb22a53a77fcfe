"""The EV3 core: explore, assess, adapt, and the step that composes them. Knows no concrete arm, loss or network."""

from ev3_distill.core.step import initial_state, make_step

__all__ = ["initial_state", "make_step"]
