"""Commands that analyse models and runs, and commands that train several runs for comparison."""
