"""Certificates: confidence bounds and the claims that rest on them. Pure statistics, without any task."""

from ev3_distill.certify.bounds import clopper_pearson_lower
from ev3_distill.certify.certificate import Bound, Certificate, Claim, Table, make_certificate

__all__ = ["Bound", "Certificate", "Claim", "Table", "clopper_pearson_lower", "make_certificate"]
