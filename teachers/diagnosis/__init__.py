"""Teacher diagnosis: finds errors in preprocessing and class order."""

from ev3_distill.teachers.diagnosis.diagnose import Diagnosis, Remedy, diagnose

__all__ = ["Diagnosis", "Remedy", "diagnose"]
