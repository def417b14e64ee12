"""Optional augmentation of a detector's training images."""
