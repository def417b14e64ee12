"""Recipes for a user's data and machine, used by the training command's option ``--data``."""
