"""Size search: the smallest student that meets its guards."""
