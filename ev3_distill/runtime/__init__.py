"""Runtime services: processes and devices, compilation, checkpoints, the ledger, files, timing and progress."""
