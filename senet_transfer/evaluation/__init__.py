"""Evaluation of detectors and classifiers, and published results to compare with."""
