"""Recipes that fit a user's data and machine (``senet train --data``)."""
