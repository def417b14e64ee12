"""Commands that analyse models and runs, or repeat runs to compare them."""
