"""Commands that analyse models and runs, and commands that compare several training runs."""
