"""Benchmarks of the tool itself: suites of measured rows, their tables, and comparisons between two runs of a suite."""

from ev3_distill.benchmarks.registry import SIZES, SUITES
from ev3_distill.benchmarks.rendering import compare_results, render_results
from ev3_distill.benchmarks.runner import run_suite

__all__ = ["SIZES", "SUITES", "compare_results", "render_results", "run_suite"]
