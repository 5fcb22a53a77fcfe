"""Search for the smallest student that meets its guards."""
