"""Layers that students share."""
