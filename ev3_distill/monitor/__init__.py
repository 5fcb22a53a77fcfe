"""Monitoring: reports, charts, the live view and TensorBoard."""

from ev3_distill.monitor.report import render, terminal_summary, write_html
from ev3_distill.monitor.sentences import certificate_sentence, claim_line, correction_sentence, guard_line

__all__ = [
    "certificate_sentence",
    "claim_line",
    "correction_sentence",
    "guard_line",
    "render",
    "terminal_summary",
    "write_html",
]
