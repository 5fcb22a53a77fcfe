"""Hypergradients: EvoGrad (arXiv 2106.10575), one-step methods and forward mode."""
