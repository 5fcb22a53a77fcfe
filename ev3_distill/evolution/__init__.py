"""Distributed evolution strategies (arXiv 2201.00093)."""
