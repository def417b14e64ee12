"""Complexity of models: parameters, multiply-accumulates and activations."""
