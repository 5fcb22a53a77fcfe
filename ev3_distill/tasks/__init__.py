"""Tasks: what a network's outputs mean, how they are scored and what a certificate may claim of them."""
