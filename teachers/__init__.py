"""Teachers: one file per kind in `kinds/`. Distillation needs their logits [N, K] on every example of a data set."""

from ev3_distill.teachers.registry import KINDS, Teacher, load_logits, load_recorded, load_teacher, save_logits

__all__ = ["KINDS", "Teacher", "load_logits", "load_recorded", "load_teacher", "save_logits"]
