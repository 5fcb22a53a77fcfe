"""Training: sets up a run, iterates the core under a budget, and certifies the delivered student."""
