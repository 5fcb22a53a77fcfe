"""Teacher diagnosis: finds errors in preprocessing and class order."""

from ev3_distill.teachers.diagnosis.diagnose import Diagnosis, Remedy, diagnose

CHECKS = {"classification": diagnose}  # by `Task.diagnosis`

__all__ = ["CHECKS", "Diagnosis", "Remedy", "diagnose"]
