"""Command-line parsers and commands, which the program ``senet`` and the scripts in tools/ run."""
