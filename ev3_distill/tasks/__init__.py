"""Tasks: what a network's outputs mean, how they are scored, and what a certificate may claim about them.

This file imports nothing: the command line reads `metrics.py` at every start, without jax.
"""
