"""Evaluation of detectors and classifiers, with published results for comparison."""
