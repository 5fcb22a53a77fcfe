"""Teacher kinds, one file each."""
