"""Recipes that fit a user's data and machine (``--data`` of the training command)."""
