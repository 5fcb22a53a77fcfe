"""Teachers: one file per kind. What distillation needs of them are logits [N, K] on every example of a data set."""

from teachers.logits import load_logits, save_logits

__all__ = ["load_logits", "save_logits"]
