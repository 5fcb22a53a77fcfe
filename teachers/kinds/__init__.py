"""Kinds of teachers, one file per kind."""
