"""Monitoring: reports, charts, the live view and TensorBoard."""
