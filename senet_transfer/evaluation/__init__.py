"""Evaluation of detectors and classifiers, and published results for comparison."""
