"""The teacher cache: stored outputs, their codec and the append-only log."""
