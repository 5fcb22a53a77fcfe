"""Certificates: confidence bounds and the claims that rest on them. Pure statistics."""
