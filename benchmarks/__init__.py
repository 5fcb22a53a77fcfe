"""Benchmarks of the tool itself: suites of rows, their tables, and comparisons between two runs of a suite."""

from ev3_distill.benchmarks.registry import SIZES, SUITES, changes, provenance, render, run

__all__ = ["SIZES", "SUITES", "changes", "provenance", "render", "run"]
