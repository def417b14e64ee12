"""Commands for small data sets."""
