"""Teacher diagnosis: finds mistakes in preprocessing and class order."""
