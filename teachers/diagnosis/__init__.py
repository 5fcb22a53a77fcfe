"""Teacher diagnosis: finds errors in preprocessing, class order, row order and the meaning of outputs."""

from ev3_distill.teachers.diagnosis.diagnose import diagnose
from ev3_distill.teachers.diagnosis.findings import Diagnosis, Remedy, RowShift
from ev3_distill.teachers.diagnosis.row_order import find_row_shift

CHECKS = {"classification": diagnose}  # by `Task.diagnosis`

__all__ = ["CHECKS", "Diagnosis", "Remedy", "RowShift", "diagnose", "find_row_shift"]
