"""Optional data augmentation for training detectors."""
