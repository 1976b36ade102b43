"""Data and shards: sources, splits, partitioners, tensors, augmentation."""
