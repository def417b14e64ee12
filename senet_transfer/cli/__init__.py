"""Commands and argument parsers for the ``senet`` program and the scripts in tools/."""
