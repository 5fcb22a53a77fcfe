"""Hypergradients: EvoGrad (arXiv 2106.10575), exact one-step methods, forward mode, and the outer optimizer."""

from ev3_distill.hypergrad.forward_mode import ForwardModeState, forward_mode_init, forward_mode_step
from ev3_distill.hypergrad.methods import METHODS, hypergradient
from ev3_distill.hypergrad.problem import HypergradientInfo, Problem, TrainLoss, ValLoss
from ev3_distill.hypergrad.spaces import OuterState, averaged_values, outer_init, outer_step
from ev3_distill.hypergrad.student_losses import student_train_loss, student_val_loss

__all__ = [
    "METHODS",
    "ForwardModeState",
    "HypergradientInfo",
    "OuterState",
    "Problem",
    "TrainLoss",
    "ValLoss",
    "averaged_values",
    "forward_mode_init",
    "forward_mode_step",
    "hypergradient",
    "outer_init",
    "outer_step",
    "student_train_loss",
    "student_val_loss",
]
