"""Student families, one file each."""
