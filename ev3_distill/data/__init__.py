"""Data: sources, splits, shuffling, augmentation, batches and the input pipeline."""
